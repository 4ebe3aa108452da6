// The canvas of the annotator "notebook" (nbs/people/05_canvas.ipynb): a photograph, its classes painted over it, and a
// person with a brush. Plain JavaScript, no build, nothing from a network. It has three parts:
//
//   pixels   the index buffer: one byte a pixel, the number of its class. Brush, outline and fill write whole numbers
//            into it, never colours, so what comes back is what was painted. Knows no browser: tests run it with node.
//   clock    the seconds that somebody worked.
//   screen   what is seen and pressed; it talks to the kernel in messages, which the chapter lists.

// ---------------------------------------------------------------------------------------------------------- pixels

const TILE = 64; // a step of undo keeps the tiles it touches, 64 x 64 pixels each
const HISTORY = 256 * 1024 * 1024; // bytes of tiles that are kept at most

const same = (one, other) => {
  for (let at = 0; at < one.length; at++) if (one[at] !== other[at]) return false;
  return true;
};

export class Mask {
  constructor(width, height, pixels) {
    this.width = width;
    this.height = height;
    this.pixels = pixels; // Uint8Array, row by row
    this.across = Math.ceil(width / TILE);
    this.done = []; // steps that undo takes back, each a Map: tile -> its pixels before
    this.undone = []; // steps that redo brings again: tile -> its pixels after
    this.step = null; // the step that is being made
    this.dirty = null; // [x0, y0, x1, y1), changed since it was last asked
  }

  begin() {
    this.end();
    this.step = new Map();
  }

  // Close the step; false if nothing has become different.
  end() {
    const step = this.step;
    this.step = null;
    if (!step) return false;
    for (const [tile, before] of step) {
      if (same(this.#read(tile), before)) step.delete(tile);
    }
    if (!step.size) return false;
    this.done.push(step);
    this.undone = [];
    let bytes = this.done.reduce((sum, one) => sum + one.size * TILE * TILE, 0);
    while (bytes > HISTORY && this.done.length > 1) bytes -= this.done.shift().size * TILE * TILE;
    return true;
  }

  undo() {
    this.end();
    return this.#swap(this.done, this.undone);
  }

  redo() {
    this.end();
    return this.#swap(this.undone, this.done);
  }

  // What has changed since the last call: [x0, y0, x1, y1), or null.
  takeDirty() {
    const rect = this.dirty;
    this.dirty = null;
    return rect;
  }

  at(x, y) {
    return x >= 0 && y >= 0 && x < this.width && y < this.height ? this.pixels[y * this.width + x] : -1;
  }

  // Every change of a pixel comes through here: [x0, x1) of one row gets a value.
  run(y, x0, x1, value) {
    x0 = Math.max(x0, 0);
    x1 = Math.min(x1, this.width);
    if (y < 0 || y >= this.height || x0 >= x1) return;
    const row = Math.floor(y / TILE) * this.across;
    for (let column = Math.floor(x0 / TILE); column * TILE < x1; column++) {
      if (!this.step.has(row + column)) this.step.set(row + column, this.#read(row + column));
    }
    this.pixels.fill(value, y * this.width + x0, y * this.width + x1);
    this.#touch(x0, y, x1, y + 1);
  }

  // The brush on its way from pixel a to pixel b: every pixel whose centre is within size / 2 of the line between their
  // centres. Whole numbers throughout, so there is no rounding and no soft edge; size is odd.
  segment(ax, ay, bx, by, size, value) {
    const dx = bx - ax, dy = by - ay, length = dx * dx + dy * dy, reach = size * size, r = (size - 1) / 2;
    const covered = (x, y) => {
      const px = x - ax, py = y - ay, along = px * dx + py * dy;
      if (along <= 0) return 4 * (px * px + py * py) <= reach;
      if (along >= length) return 4 * ((x - bx) ** 2 + (y - by) ** 2) <= reach;
      return 4 * (px * dy - py * dx) ** 2 <= reach * length;
    };
    const top = Math.max(Math.min(ay, by) - r, 0), bottom = Math.min(Math.max(ay, by) + r, this.height - 1);
    for (let y = top; y <= bottom; y++) {
      const [from, to] = dy ? [(y - r - 1 - ay) / dy, (y + r + 1 - ay) / dy].sort((p, q) => p - q) : [0, 1];
      const near = ax + dx * Math.max(from, 0), far = ax + dx * Math.min(to, 1); // where the line passes this row
      let x0 = Math.max(Math.floor(Math.min(near, far)) - r - 1, 0);
      let x1 = Math.min(Math.ceil(Math.max(near, far)) + r + 1, this.width - 1);
      while (x0 <= x1 && !covered(x0, y)) x0++;
      while (x1 > x0 && !covered(x1, y)) x1--;
      this.run(y, x0, x1 + 1, value);
    }
  }

  // The inside of an outline by the even-odd rule, with the outline itself. Points are pixels.
  polygon(points, value) {
    const edges = points.map((point, index) => [point, points[(index + 1) % points.length]]);
    const rows = points.map((point) => point[1]);
    const top = Math.max(Math.min(...rows), 0), bottom = Math.min(Math.max(...rows), this.height - 1);
    for (let y = top; y <= bottom; y++) {
      const crossed = edges.filter(([a, b]) => a[1] <= y !== b[1] <= y);
      const at = crossed.map(([a, b]) => a[0] + ((y - a[1]) * (b[0] - a[0])) / (b[1] - a[1])).sort((p, q) => p - q);
      for (let i = 0; i + 1 < at.length; i += 2) this.run(y, Math.ceil(at[i]), Math.floor(at[i + 1]) + 1, value);
    }
    for (const [a, b] of edges) this.segment(a[0], a[1], b[0], b[1], 1, value);
  }

  // All pixels of one class that hang together with (x, y), by their sides.
  fill(x, y, value) {
    const { width, height, pixels } = this, old = this.at(x, y);
    if (old < 0 || old === value) return;
    const seeds = [[x, y]];
    while (seeds.length) {
      const [sx, sy] = seeds.pop(), row = sy * width;
      if (pixels[row + sx] !== old) continue;
      let x0 = sx, x1 = sx + 1;
      while (x0 > 0 && pixels[row + x0 - 1] === old) x0--;
      while (x1 < width && pixels[row + x1] === old) x1++;
      this.run(sy, x0, x1, value);
      for (const ny of [sy - 1, sy + 1]) {
        if (ny < 0 || ny >= height) continue;
        for (let nx = x0; nx < x1; nx++) {
          const begins = pixels[ny * width + nx] === old && (nx === x0 || pixels[ny * width + nx - 1] !== old);
          if (begins) seeds.push([nx, ny]);
        }
      }
    }
  }

  // Another mask in place of this one, as a step that can be undone.
  replace(pixels) {
    this.begin();
    for (let tile = 0; tile < this.across * Math.ceil(this.height / TILE); tile++) {
      this.step.set(tile, this.#read(tile));
    }
    this.pixels.set(pixels);
    this.#touch(0, 0, this.width, this.height);
    return this.end();
  }

  #box(tile) {
    const x = (tile % this.across) * TILE, y = Math.floor(tile / this.across) * TILE;
    return [x, y, Math.min(x + TILE, this.width), Math.min(y + TILE, this.height)];
  }

  #read(tile) {
    const [x0, y0, x1, y1] = this.#box(tile), out = new Uint8Array((x1 - x0) * (y1 - y0));
    for (let y = y0, to = 0; y < y1; y++, to += x1 - x0) {
      out.set(this.pixels.subarray(y * this.width + x0, y * this.width + x1), to);
    }
    return out;
  }

  #write(tile, values) {
    const [x0, y0, x1, y1] = this.#box(tile), across = x1 - x0;
    for (let y = y0, from = 0; y < y1; y++, from += across) {
      this.pixels.set(values.subarray(from, from + across), y * this.width + x0);
    }
    this.#touch(x0, y0, x1, y1);
  }

  #swap(from, to) {
    const step = from.pop();
    if (!step) return false;
    for (const [tile, values] of step) {
      step.set(tile, this.#read(tile));
      this.#write(tile, values);
    }
    to.push(step);
    return true;
  }

  #touch(x0, y0, x1, y1) {
    const d = this.dirty;
    this.dirty = d ? [Math.min(d[0], x0), Math.min(d[1], y0), Math.max(d[2], x1), Math.max(d[3], y1)] : [x0, y0, x1, y1];
  }
}

// Colours for what is seen: of each pixel of the screen the class below its middle, and a solid line where two classes
// meet. `soft` and `solid` are tables of 256 colours, `stripes` one of 256 flags: such classes are hatched.
export function paintScreen(out, view, mask, tables, [vx0, vy0, vx1, vy1]) {
  const { width, height, pixels } = mask, { soft, solid, stripes } = tables;
  const columns = new Int32Array(view.width + 1); // the image's column below each of the screen's; -1 = outside
  for (let vx = vx0 - 1; vx < vx1; vx++) {
    const x = Math.floor(view.x + (vx + 0.5) / view.scale);
    columns[vx + 1] = x >= 0 && x < width ? x : -1;
  }
  for (let vy = vy0; vy < vy1; vy++) {
    const y = Math.floor(view.y + (vy + 0.5) / view.scale), above = Math.floor(view.y + (vy - 0.5) / view.scale);
    const inside = y >= 0 && y < height, row = y * width, rowAbove = (above >= 0 ? above : y) * width;
    let left = inside && columns[vx0] >= 0 ? pixels[row + columns[vx0]] : -1;
    for (let vx = vx0; vx < vx1; vx++) {
      const x = columns[vx + 1];
      if (!inside || x < 0) {
        out[vy * view.width + vx] = 0;
        continue;
      }
      const here = pixels[row + x], up = pixels[rowAbove + x];
      const other = left >= 0 && left !== here ? left : up;
      const hatched = stripes[here] && (vx + vy) & 4;
      out[vy * view.width + vx] = other !== here ? solid[here] || solid[other] : hatched ? 0 : soft[here];
      left = here;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- clock

// Counts while somebody works: not while the page is hidden, and not after 60 seconds in which nothing happened.
export class WorkClock {
  constructor(now, patience = 60) {
    this.now = now; // seconds, a function
    this.patience = patience;
    this.seconds = 0;
    this.since = null; // counted up to here; null = it stands
    this.last = 0; // when something happened last
  }

  start(seconds, working) {
    this.seconds = seconds;
    this.since = null;
    if (working) this.touch();
  }

  touch() {
    this.read();
    this.last = this.now();
    this.since ??= this.last;
  }

  pause() {
    this.read();
    this.since = null;
  }

  get runs() {
    return this.since !== null && this.now() < this.last + this.patience;
  }

  read() {
    if (this.since === null) return this.seconds;
    const now = this.now(), end = Math.min(now, this.last + this.patience);
    this.seconds += Math.max(end - this.since, 0);
    this.since = now < this.last + this.patience ? now : null;
    return this.seconds;
  }
}

// ---------------------------------------------------------------------------------------------------------- screen

const through = (bytes, stream) => new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer();
const deflate = (pixels) => through(pixels, new CompressionStream("deflate"));
const inflate = async (bytes) => new Uint8Array(await through(bytes, new DecompressionStream("deflate")));

const TOOLS = { brush: "Brush", erase: "Erase", outline: "Outline", fill: "Fill" };
const ASKED = { draw: "draw its mask", fix: "fix the proposal", verify: "is the proposal good?" };
const WHY = {
  brush: "paint; right button erases; Alt + click takes the class under the pointer",
  erase: "paint away what is marked",
  outline: "click corner by corner, or drag; close with a double click or Enter, take a corner back with Backspace",
  fill: "give a whole area the chosen class",
};
const KEYS = `<b>1 ... 9, 0</b> class (with Shift the next ten), <b>V</b> void, <b>Alt + click</b> the class under the pointer;
  <b>B E O F</b> tools, <b>right button</b> or the pen's other end erases, <b>[ ]</b> or Shift + wheel size;
  <b>wheel</b> or <b>+ &minus;</b> closer and farther, <b>Space + drag</b> or middle button moves, <b>W</b> whole, <b>H</b> hide;
  <b>Z</b> undo, <b>Y</b> redo, <b>Enter</b> submit, <b>S</b> skip, <b>N</b> no, <b>&larr; &rarr;</b> other images.
  An outline closes with Enter or a double click; Backspace takes a corner back, Escape all of them.`;
const PAGE = `
  <div class="top"><b class="place"></b><span class="asked"></span><span class="clock" title="Time that you worked"></span></div>
  <div class="reason"></div>
  <div class="bar">
    <span class="group tools"></span>
    <label title="[ and ], or Shift + wheel">Size <input class="size" type="range" min="0" max="1000"><output class="px"></output></label>
    <label title="How strongly the classes are painted">Opacity <input class="opacity" type="range" min="0" max="100"></label>
    <span class="group">
      <button data-do="hide" title="Show the photograph alone"><u>H</u>ide</button>
      <button data-do="in" title="Closer (+, or the wheel)">+</button>
      <button data-do="out" title="Farther (-, or the wheel)">&minus;</button>
      <button data-do="whole" title="The whole photograph (Space + drag, or the middle button, moves it)"><u>W</u>hole</button>
    </span>
    <span class="group">
      <button data-do="undo" title="Take the last step back (Z)">Undo <kbd>Z</kbd></button>
      <button data-do="redo" title="Do it again (Y)">Redo <kbd>Y</kbd></button>
      <button data-do="reset" title="Back to what was there at first; can be undone">Reset</button>
    </span>
  </div>
  <div class="middle">
    <div class="stage"><canvas class="photo"></canvas><canvas class="paint"></canvas><svg><polyline class="dark"/><polyline class="light"/><circle class="dark"/><circle class="light"/></svg><div class="veil">waiting for the kernel</div></div>
    <div class="side"><div class="legend"></div></div>
  </div>
  <div class="bar bottom">
    <span class="group">
      <button data-do="earlier" title="The image before this one">&larr;</button>
      <button data-do="later" title="The image after this one">&rarr;</button>
      <button data-do="skip" title="I do not want to answer this one"><u>S</u>kip</button>
    </span>
    <span class="state"></span><span class="under"></span>
    <button data-do="reject" class="no" title="The proposal is not good"><u>N</u>o</button>
    <button data-do="submit" class="yes"></button>
  </div>
  <details><summary>Keys</summary>${KEYS}</details>`;

class Screen {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.name = crypto.getRandomValues(new Uint32Array(2)).join("-"); // of this view of the canvas
    this.classes = model.get("classes"); // {name, color: [r, g, b], value}; the last one is void
    this.blank = model.get("blank"); // the value of what is not painted
    this.chosen = this.classes.find((one) => one.value !== this.blank).value;
    this.tool = "brush";
    this.size = 0; // of the brush, pixels of the image; 0 = from the first image
    this.opacity = 0.5;
    this.hidden = false;
    this.lit = null; // the class that the pointer is over in the legend
    this.task = null; // what is asked; null = the kernel has not said
    this.mask = null;
    this.view = { x: 0, y: 0, scale: 1, width: 1, height: 1 }; // image corner at the screen's, screen pixels per pixel
    this.fitted = true;
    this.points = []; // of the outline in the making
    this.press = null; // what the button that is held down does
    this.clock = new WorkClock(() => performance.now() / 1000);
    this.leave = new AbortController();
    this.#build();
    this.#listen();
    model.on("msg:custom", this.hear);
    this.send({ what: "ready" });
    this.#expect();
  }

  close() {
    this.keepDraft();
    this.leave.abort();
    this.resizes.disconnect();
    clearInterval(this.ticks);
    this.model.off("msg:custom", this.hear);
  }

  // ---- what is said

  send(message, buffers = []) {
    this.model.send({ ...message, view: this.name }, undefined, buffers);
  }

  hear = (message, buffers) => {
    if (message.view && message.view !== this.name) return;
    if (message.what === "task") this.#show(message, buffers);
    if (message.what === "kept") this.#kept();
    if (message.what === "done") this.#finish(message);
    if (message.what === "problem") this.#problem(message.text);
  };

  async #show(task, [photo, start, mask]) {
    clearTimeout(this.patience);
    if (this.task?.id === task.id && !this.drafted && !this.sent) return; // it is here, and was painted on since
    await this.keepDraft(); // what was painted while the kernel took its time
    const working = this.sent; // whoever has just answered is looking at the next one already
    const [picture, ...both] = await Promise.all([createImageBitmap(new Blob([photo])), inflate(start), inflate(mask)]);
    this.task = task;
    this.start = both[0];
    this.mask = new Mask(task.width, task.height, both[1]);
    this.pictures = [picture];
    this.points = [];
    this.press = null;
    this.sent = false;
    this.drafted = true; // the kernel has what is here
    this.keptSeconds = task.seconds; // and how long it took
    this.size ||= Math.round(Math.min(task.width, task.height) / 50) * 2 + 1;
    this.clock.start(task.seconds, working && !document.hidden);
    this.at("place").textContent = `${task.place} of ${task.total}`;
    this.at("asked").textContent = `${task.name}: ${ASKED[task.ask]}`;
    this.at("reason").textContent = task.reason ? `Why this image: ${task.reason}` : "";
    this.at("under").textContent = "";
    this.veil("");
    this.#tell();
    this.#fit();
    this.#changed();
    await this.#shrink(picture, task);
  }

  // Smaller copies, so that moving a large photograph does not mean reading all of it each time.
  async #shrink(picture, task) {
    for (let last = picture; last.width > 2048 && this.task === task; ) {
      const options = { resizeWidth: last.width >> 1, resizeHeight: last.height >> 1, resizeQuality: "medium" };
      last = await createImageBitmap(last, options);
      if (this.task === task) this.pictures.push(last);
    }
  }

  #finish(message) {
    clearTimeout(this.patience);
    this.task = this.mask = null;
    this.sent = false;
    this.clock.pause();
    this.at("place").textContent = message.total ? `All ${message.total} answered` : "Nothing is asked";
    this.at("asked").textContent = this.at("reason").textContent = this.at("state").textContent = "";
    this.veil(message.total ? "All answered. Run the cell again: it goes on from here." : "Nothing to do here.");
    this.#buttons();
  }

  #kept() {
    clearTimeout(this.patience);
    if (this.task && !this.sent) this.#tell();
  }

  #problem(text) {
    clearTimeout(this.patience);
    this.sent = this.drafted = false;
    this.at("state").textContent = text;
    this.at("state").classList.add("bad");
    this.#buttons();
  }

  // Nothing comes back while the kernel computes, or ever, where it was started anew: say so.
  #expect() {
    clearTimeout(this.patience);
    this.patience = setTimeout(() => {
      const text = "The kernel does not answer. Is it busy? Then wait. Was it restarted? Then reload this page and run the cell again.";
      if (this.task) this.#problem(text);
      else this.veil(text);
    }, 4000);
  }

  async answer(what) {
    if (!this.mask || this.sent || this.press) return;
    this.sent = true;
    const message = { what, id: this.task.id, seconds: this.clock.read() };
    this.clock.pause();
    this.at("state").textContent = "saving";
    this.#buttons();
    this.#expect();
    clearTimeout(this.draft);
    this.drafted = true;
    this.send(message, what === "submit" ? [await deflate(this.mask.pixels)] : []);
  }

  async step(by) {
    if (this.press || this.sent) return;
    await this.keepDraft();
    this.send({ what: "go", id: this.task?.id ?? "", by });
  }

  // What is unfinished goes to the kernel as well, so that a lost kernel or page costs seconds of work, not minutes.
  async keepDraft() {
    clearTimeout(this.draft);
    if (!this.mask || this.sent || (this.drafted && this.clock.read() < this.keptSeconds + 1)) return;
    const painted = !this.drafted;
    this.drafted = true;
    this.keptSeconds = this.clock.read(); // who looked and painted nothing has worked, too
    this.#expect();
    const message = { what: "draft", id: this.task.id, seconds: this.keptSeconds };
    this.send(message, painted ? [await deflate(this.mask.pixels)] : []);
  }

  // ---- what is seen

  at(name) {
    return this.root.querySelector(`.${name}`);
  }

  #build() {
    this.root.classList.add("itl-canvas");
    this.root.tabIndex = 0;
    this.root.setAttribute("data-lm-suppress-shortcuts", "true"); // else JupyterLab takes A, B, X ... for itself
    this.root.innerHTML = PAGE;
    this.photo = this.at("photo").getContext("2d");
    this.paint = this.at("paint").getContext("2d");
    this.stage = this.at("stage");
    for (const [name, label] of Object.entries(TOOLS)) {
      const button = this.at("tools").appendChild(document.createElement("button"));
      button.innerHTML = `<u>${label[0]}</u>${label.slice(1)}`;
      button.title = WHY[name];
      button.dataset.tool = name;
    }
    this.classes.forEach((one, index) => {
      const button = this.at("legend").appendChild(document.createElement("button"));
      const key = one.value === 255 ? "V" : index < 10 ? `${(index + 1) % 10}` : index < 20 ? `⇧${(index + 1) % 10}` : "";
      button.innerHTML = `<kbd>${key}</kbd><i></i><span></span>`;
      button.querySelector("span").textContent = button.title = one.name;
      button.querySelector("i").style.backgroundColor = `rgb(${one.color})`;
      button.querySelector("i").classList.toggle("hatched", one.value === 255);
      button.dataset.value = one.value;
    });
    this.at("opacity").value = 100 * this.opacity;
    this.#resize();
    this.#buttons();
  }

  veil(text) {
    this.at("veil").textContent = text;
    this.at("veil").hidden = !text;
  }

  #tell() {
    const { verdict, answered, total } = this.task;
    const earlier = verdict ? `you answered this one: ${verdict}` : "";
    this.at("state").textContent = [`${answered} of ${total} answered`, earlier].filter(Boolean).join("; ");
    this.at("state").classList.remove("bad");
  }

  #buttons() {
    const ready = Boolean(this.mask) && !this.sent, ask = this.task?.ask;
    for (const button of this.root.querySelectorAll("[data-tool]")) {
      button.classList.toggle("on", button.dataset.tool === this.tool);
    }
    for (const button of this.root.querySelectorAll("[data-value]")) {
      button.classList.toggle("on", +button.dataset.value === this.chosen);
    }
    for (const button of this.root.querySelectorAll(".bottom button")) button.disabled = !ready;
    for (const name of ["earlier", "later"]) this.root.querySelector(`[data-do=${name}]`).disabled = this.sent;
    this.root.querySelector("[data-do=undo]").disabled = !ready || !this.mask.done.length;
    this.root.querySelector("[data-do=redo]").disabled = !ready || !this.mask.undone.length;
    this.root.querySelector("[data-do=hide]").classList.toggle("on", this.hidden);
    this.at("no").hidden = ask !== "verify" || this.differs;
    const label = { draw: "Submit", fix: "Accept", verify: "Yes" }[ask] ?? "Submit";
    this.at("yes").innerHTML = `${["fix", "verify"].includes(ask) && this.differs ? "Submit fix" : label} <kbd>Enter</kbd>`;
    this.at("size").value = Math.round((1000 * Math.log(this.size || 1)) / Math.log(501));
    this.at("px").textContent = `${this.size} px`;
  }

  #tables() {
    const soft = new Uint32Array(256), solid = new Uint32Array(256), stripes = new Uint8Array(256);
    for (const { value, color: [red, green, blue] } of this.classes) {
      if (value === this.blank) continue; // what is not painted shows the photograph
      const strength = this.lit === null ? this.opacity : this.lit === value ? Math.max(this.opacity, 0.7) : 0.1;
      const colors = (alpha, light) => {
        const [r, g, b] = [red, green, blue].map((level) => Math.round(level + (255 - level) * light));
        return ((Math.round(255 * alpha) << 24) | (b << 16) | (g << 8) | r) >>> 0;
      };
      soft[value] = colors(strength, 0);
      solid[value] = colors(1, 0.4); // lighter than the area, so that dark colours end visibly on dark ground
      stripes[value] = value === 255;
    }
    return { soft, solid, stripes };
  }

  // Everything anew: photograph and classes.
  draw() {
    const { view, photo, pictures, mask } = this;
    photo.clearRect(0, 0, view.width, view.height);
    if (!mask) return this.paint.clearRect(0, 0, view.width, view.height);
    const fits = pictures.filter((one) => one.width >= mask.width * view.scale);
    photo.imageSmoothingEnabled = view.scale < 3;
    const [x, y] = [-view.x * view.scale, -view.y * view.scale];
    photo.drawImage(fits.at(-1) ?? pictures[0], x, y, mask.width * view.scale, mask.height * view.scale);
    this.drawClasses();
    this.#drawOutline();
  }

  // The classes in a part of the image, or in all of it; the work depends on the screen, not on the image.
  drawClasses(rect = null) {
    const { view, mask } = this;
    const toScreen = (value, origin, size) => Math.min(Math.max((value - origin) * view.scale, 0), size);
    const [x0, y0, x1, y1] = rect ?? [-Infinity, -Infinity, Infinity, Infinity];
    const part = [
      Math.max(Math.floor(toScreen(x0, view.x, view.width)) - 1, 0),
      Math.max(Math.floor(toScreen(y0, view.y, view.height)) - 1, 0),
      Math.min(Math.ceil(toScreen(x1, view.x, view.width)) + 2, view.width),
      Math.min(Math.ceil(toScreen(y1, view.y, view.height)) + 2, view.height),
    ];
    const colors = new Uint32Array(this.screen.data.buffer);
    if (this.hidden) colors.fill(0);
    else paintScreen(colors, view, mask, this.#tables(), part);
    this.paint.putImageData(this.screen, 0, 0, part[0], part[1], part[2] - part[0], part[3] - part[1]);
  }

  #drawOutline() {
    const ratio = devicePixelRatio, { view } = this;
    const place = ([x, y]) => `${((x + 0.5 - view.x) * view.scale) / ratio},${((y + 0.5 - view.y) * view.scale) / ratio}`;
    const points = this.points.length && this.pointer ? [...this.points, this.pointer] : this.points;
    for (const line of this.root.querySelectorAll("polyline")) line.setAttribute("points", points.map(place).join(" "));
  }

  // The ring of the brush, and the name of what is under it.
  #drawPointer(event) {
    const { box, mask, view, tool } = this, inside = event && mask;
    this.pointer = inside ? this.pixel(event) : null;
    const round = tool === "brush" || tool === "erase";
    const radius = round ? Math.max((this.size * view.scale) / devicePixelRatio / 2, 2) : 3;
    for (const circle of this.root.querySelectorAll("circle")) {
      circle.setAttribute("r", inside ? radius : 0);
      if (inside) circle.setAttribute("cx", event.clientX - box.left);
      if (inside) circle.setAttribute("cy", event.clientY - box.top);
    }
    const value = inside ? mask.at(...this.pointer) : -1;
    this.at("under").textContent = this.classes.find((one) => one.value === value)?.name ?? "";
    if (this.points.length) this.#drawOutline();
  }

  get box() {
    return this.stage.getBoundingClientRect();
  }

  // The pixel of the image under the pointer.
  pixel(event, box = this.box) {
    const { view } = this, ratio = devicePixelRatio;
    const x = view.x + ((event.clientX - box.left) * ratio) / view.scale;
    return [Math.floor(x), Math.floor(view.y + ((event.clientY - box.top) * ratio) / view.scale)];
  }

  #resize() {
    const width = Math.max(Math.round(this.stage.clientWidth * devicePixelRatio), 1);
    const height = Math.max(Math.round(this.stage.clientHeight * devicePixelRatio), 1);
    for (const { canvas } of [this.photo, this.paint]) Object.assign(canvas, { width, height });
    this.screen = this.paint.createImageData(width, height);
    Object.assign(this.view, { width, height });
    if (this.fitted) this.#fit();
    else this.draw();
  }

  #fit() {
    const { view, mask } = this;
    this.fitted = true;
    if (mask) {
      view.scale = Math.min(view.width / mask.width, view.height / mask.height);
      view.x = (mask.width - view.width / view.scale) / 2;
      view.y = (mask.height - view.height / view.scale) / 2;
    }
    this.draw();
  }

  // Closer or farther, the point under (clientX, clientY) staying where it is.
  zoom(factor, event = null) {
    if (!this.mask) return;
    const { view, box } = this, ratio = devicePixelRatio;
    const [sx, sy] = event
      ? [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio]
      : [view.width / 2, view.height / 2];
    const whole = Math.min(view.width / this.mask.width, view.height / this.mask.height);
    const scale = Math.min(Math.max(view.scale * factor, whole / 2), Math.max(40 * ratio, whole)); // tiny ones fit at more
    view.x += sx / view.scale - sx / scale;
    view.y += sy / view.scale - sy / scale;
    view.scale = scale;
    this.fitted = false;
    this.draw();
  }

  // ---- what is done

  #changed() {
    this.differs = !same(this.mask.pixels, this.start);
    this.#buttons();
  }

  // After a step: show it, and give the kernel a copy when there is a pause.
  #stepped() {
    const rect = this.mask.takeDirty();
    if (rect) this.drawClasses(rect);
    this.#changed();
    this.drafted = false;
    clearTimeout(this.draft);
    this.draft = setTimeout(() => !this.press && this.keepDraft(), 3000);
  }

  #outlined() {
    const points = this.points;
    this.points = [];
    if (points.length > 2) {
      this.mask.begin();
      this.mask.polygon(points, this.chosen);
      if (this.mask.end()) this.#stepped();
    }
    this.#drawOutline();
  }

  choose(value) {
    this.chosen = value;
    if (this.tool === "erase") this.tool = "brush";
    this.#buttons();
  }

  use(tool) {
    this.tool = tool;
    if (tool !== "outline") this.points = [];
    this.#drawOutline();
    this.#buttons();
  }

  resizeBrush(size) {
    this.size = Math.min(Math.max(Math.round((size - 1) / 2) * 2 + 1, 1), 501);
    this.#buttons();
  }

  grow(by) {
    this.resizeBrush(by > 0 ? Math.max(this.size * 1.25, this.size + 2) : Math.min(this.size / 1.25, this.size - 2));
  }

  do = {
    hide: () => {
      this.hidden = !this.hidden;
      this.#buttons();
      this.draw();
    },
    in: () => this.zoom(1.5),
    out: () => this.zoom(1 / 1.5),
    whole: () => this.#fit(),
    undo: () => this.mask?.undo() && this.#stepped(),
    redo: () => this.mask?.redo() && this.#stepped(),
    reset: () => this.mask?.replace(this.start) && this.#stepped(),
    earlier: () => this.step(-1),
    later: () => this.step(1),
    skip: () => this.answer("skip"),
    reject: () => !this.at("no").hidden && this.answer("reject"),
    submit: () => (this.points.length > 2 ? this.#outlined() : this.answer("submit")),
  };

  #down(event) {
    if (!this.mask || this.sent || this.press) return;
    this.stage.setPointerCapture(event.pointerId);
    const [x, y] = this.pixel(event);
    if (event.button === 1 || this.space) {
      this.press = { move: true, x: event.clientX, y: event.clientY };
    } else if (event.altKey) {
      if (this.mask.at(x, y) >= 0) this.choose(this.mask.at(x, y));
    } else if (this.tool === "outline" && event.button === 0) {
      this.points.push([x, y]);
      this.press = { outline: true };
      this.#drawOutline();
    } else {
      const away = this.tool === "erase" || event.button === 2 || event.buttons & 32; // 32: the other end of a pen
      this.mask.begin();
      const value = away ? this.blank : this.chosen;
      if (this.tool === "fill") this.mask.fill(x, y, value);
      else this.mask.segment(x, y, x, y, this.size, value);
      this.press = { value, x, y, fill: this.tool === "fill" };
      this.drawClasses(this.mask.takeDirty() ?? [0, 0, 0, 0]);
    }
  }

  #move(event) {
    if (this.press?.move) this.#pan(event);
    else if (this.press && !this.press.fill) this.#stroke(event);
    this.#drawPointer(event);
  }

  #pan(event) {
    const { view, press } = this;
    view.x -= ((event.clientX - press.x) * devicePixelRatio) / view.scale;
    view.y -= ((event.clientY - press.y) * devicePixelRatio) / view.scale;
    Object.assign(press, { x: event.clientX, y: event.clientY });
    this.fitted = false;
    this.draw();
  }

  #stroke(event) {
    const { press, box } = this, between = event.getCoalescedEvents?.() ?? []; // what the mouse did since the last picture
    for (const one of between.length ? between : [event]) {
      const [x, y] = this.pixel(one, box);
      if (press.outline) {
        const [px, py] = this.points.at(-1);
        if ((x - px) ** 2 + (y - py) ** 2 >= (6 / this.view.scale) ** 2) this.points.push([x, y]);
      } else {
        this.mask.segment(press.x, press.y, x, y, this.size, press.value);
        Object.assign(press, { x, y });
      }
    }
    const rect = this.mask.takeDirty();
    if (rect) this.drawClasses(rect);
  }

  #up() {
    const press = this.press;
    this.press = null;
    if (press && "value" in press && this.mask?.end()) this.#stepped();
  }

  #key(event) {
    const key = event.key.toLowerCase(), digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
    const command = event.ctrlKey || event.metaKey;
    if (event.target.matches("input") && key !== "enter") return event.stopPropagation();
    const tools = { b: "brush", e: "erase", o: "outline", f: "fill" };
    const actions = { h: "hide", "+": "in", "=": "in", "-": "out", w: "whole", z: "undo", y: "redo", s: "skip" };
    Object.assign(actions, { n: "reject", enter: "submit", arrowleft: "earlier", arrowright: "later" });
    let act = null;
    if (command && key === "z") act = event.shiftKey ? this.do.redo : this.do.undo;
    else if (command && key === "y") act = this.do.redo;
    else if (command || event.altKey) return;
    else if (digit !== undefined) {
      const one = this.classes[((+digit + 9) % 10) + (event.shiftKey ? 10 : 0)];
      act = () => one && this.choose(one.value);
    } else if (key === "v") act = () => this.choose(255);
    else if (key === "[" || event.code === "BracketLeft") act = () => this.grow(-1);
    else if (key === "]" || event.code === "BracketRight") act = () => this.grow(1);
    else if (key === " ") act = () => (this.space = true);
    else if (key === "escape" || (key === "backspace" && this.tool === "outline")) {
      act = () => {
        this.points = key === "escape" ? [] : this.points.slice(0, -1);
        this.#drawOutline();
      };
    } else if (tools[key]) act = () => this.use(tools[key]);
    else if (actions[key]) act = () => (event.repeat && key === "enter") || this.do[actions[key]]();
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    if (!this.press) act(); // a stroke is finished first
  }

  #listen() {
    const on = (target, names, act, more = {}) => {
      const options = { signal: this.leave.signal, ...more };
      for (const name of names.split(" ")) target.addEventListener(name, act, options);
    };
    on(this.root, "pointerdown pointermove keydown wheel", () => this.clock.touch(), { passive: true, capture: true });
    on(document, "visibilitychange", () => {
      if (!document.hidden) return;
      this.clock.pause();
      this.keepDraft();
    });
    on(this.root, "pointerdown", (event) => {
      if (event.target.matches("input")) return;
      event.preventDefault(); // the keys stay with the canvas, whatever is pressed
      this.root.focus({ preventScroll: true });
    });
    on(this.root, "mousedown click dblclick contextmenu", (event) => event.stopPropagation());
    on(this.root, "click", (event) => {
      const { do: action, tool, value } = event.target.closest("button")?.dataset ?? {};
      if (action) this.do[action]();
      if (tool) this.use(tool);
      if (value) this.choose(+value);
    });
    on(this.root, "keydown", (event) => this.#key(event));
    on(this.root, "keyup blur", (event) => (event.type === "blur" || event.key === " ") && (this.space = false));
    on(this.stage, "pointerdown", (event) => this.#down(event));
    on(this.stage, "pointermove", (event) => this.#move(event));
    on(this.stage, "pointerup pointercancel", () => this.#up());
    on(this.stage, "pointerleave", () => this.#drawPointer(null));
    on(this.stage, "dblclick", () => this.tool === "outline" && this.mask && this.#outlined());
    on(this.stage, "contextmenu", (event) => event.preventDefault());
    on(this.stage, "wheel", (event) => {
      if (!this.root.contains(document.activeElement)) return; // until it is clicked, the notebook scrolls
      event.preventDefault();
      const far = event.deltaY || event.deltaX; // Shift turns the wheel sideways
      if (event.shiftKey) this.grow(-far);
      else this.zoom(Math.exp(-Math.sign(far) * Math.min(Math.abs(far), 120) * 0.0025), event);
      this.#drawPointer(event);
    }, { passive: false });
    on(this.at("opacity"), "input", (event) => {
      this.opacity = event.target.value / 100;
      if (this.mask) this.drawClasses();
    });
    on(this.at("size"), "input", (event) => this.resizeBrush(501 ** (event.target.value / 1000)));
    on(this.root, "change", () => this.root.focus({ preventScroll: true }));
    on(this.at("legend"), "pointerover pointerleave", (event) => {
      const button = event.type === "pointerover" ? event.target.closest("button") : null;
      this.lit = button && +button.dataset.value !== this.blank ? +button.dataset.value : null;
      if (this.mask) this.drawClasses();
    });
    this.resizes = new ResizeObserver(() => this.#resize());
    this.resizes.observe(this.stage);
    this.ticks = setInterval(() => {
      const seconds = Math.floor(this.clock.read()), text = `${Math.floor(seconds / 60)}:${`${seconds % 60}`.padStart(2, "0")}`;
      this.at("clock").textContent = this.task ? text + (this.clock.runs ? "" : " (stands)") : "";
    }, 500);
  }
}

export default {
  render({ model, el }) {
    const screen = new Screen(model, el);
    return () => screen.close();
  },
};
