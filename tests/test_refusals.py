"""What servers say when they refuse, in the words of many: the field decides, and the smallest step down is taken."""

# ruff: noqa: E501  (the bodies are as they came)
from __future__ import annotations

from typing import Any

import pytest

from vlm_itl.vlm.refusals import PROVIDERS, Bounds, bounds_in, error_inside, likely_address, read_refusal, weaker


def detail(field: str, words: str = "Extra inputs are not permitted") -> dict[str, Any]:
    """As FastAPI says it."""
    return {"type": "extra_forbidden", "loc": ["body", field], "msg": words, "input": 1}


SENT: dict[str, Any] = {"logprobs": True, "top_logprobs": 20, "max_tokens": 64, "temperature": 0.0}

STEPS: list[tuple[str, int, Any, dict[str, Any]]] = [
    (
        "openai",
        400,
        {
            "error": {
                "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
                "type": "invalid_request_error",
                "param": "max_tokens",
                "code": "unsupported_parameter",
            }
        },
        {"max_tokens": None, "max_completion_tokens": 64},
    ),
    (
        "openai temp",
        400,
        {
            "error": {
                "message": "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is supported.",
                "type": "invalid_request_error",
                "param": "temperature",
                "code": "unsupported_value",
            }
        },
        {"temperature": None},
    ),
    (
        "openai lp",
        400,
        {
            "error": {
                "message": "This model does not support the 'logprobs' parameter.",
                "type": "invalid_request_error",
                "param": "logprobs",
                "code": None,
            }
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "openai unrec",
        400,
        {
            "error": {
                "message": "Unrecognized request argument supplied: logprobs",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "openai 403",
        403,
        {
            "error": {
                "message": "You are not allowed to request logprobs from this model",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "azure",
        400,
        {
            "error": {
                "requestid": "5b8",
                "code": 400,
                "message": "Validation error at #/logprobs: Extra inputs are not permitted",
            }
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "azure 5",
        400,
        {
            "error": {
                "message": "Invalid value for 'top_logprobs': must be less than or equal to 5.",
                "type": "invalid_request_error",
                "param": "top_logprobs",
                "code": None,
            }
        },
        {"top_logprobs": 5},
    ),
    (
        "vllm",
        400,
        {
            "object": "error",
            "message": "Requested sample logprobs of 20, which is greater than max allowed: 5",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
        {"top_logprobs": 5},
    ),
    (
        "vllm new",
        400,
        {
            "error": {
                "message": "Requested sample logprobs of 20, which is greater than max allowed: 10 (parameter=logprobs, value=20)",
                "type": "BadRequestError",
                "param": "logprobs",
                "code": 400,
            }
        },
        {"top_logprobs": 10},
    ),
    (
        "vllm loc",
        400,
        {
            "object": "error",
            "message": "[{'type': 'extra_forbidden', 'loc': ('body', 'logprobs'), 'msg': 'Extra inputs are not permitted', 'input': True}]",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "fastapi",
        422,
        {"detail": [detail("top_logprobs", "Input should be less than or equal to 5")]},
        {"top_logprobs": 5},
    ),
    ("fastapi text", 400, {"detail": "Unsupported parameter: temperature"}, {"temperature": None}),
    (
        "tgi",
        422,
        {
            "error": "Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 20",
            "error_type": "validation",
        },
        {"top_logprobs": 5},
    ),
    (
        "tgi temp",
        422,
        {"error": "Input validation error: `temperature` must be strictly positive", "error_type": "validation"},
        {"temperature": 0.01},
    ),
    ("tgi text", 422, "Input validation error: `temperature` must be strictly positive", {"temperature": 0.01}),
    (
        "gemini",
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": 'Invalid JSON payload received. Unknown name "logprobs": Cannot find field.\nInvalid JSON payload received. Unknown name "top_logprobs": Cannot find field.',
                    "status": "INVALID_ARGUMENT",
                    "details": [
                        {
                            "@type": "type.googleapis.com/google.rpc.BadRequest",
                            "fieldViolations": [
                                {
                                    "description": 'Invalid JSON payload received. Unknown name "logprobs": Cannot find field.'
                                }
                            ],
                        }
                    ],
                }
            }
        ],
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "gemini2",
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "Logprobs is not enabled for models/gemini-2.5-pro",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "gemini camel",
        400,
        {
            "error": {
                "code": 400,
                "message": "Invalid value at 'generation_config.response_logprobs'",
                "status": "INVALID_ARGUMENT",
                "details": [
                    {
                        "fieldViolations": [
                            {"field": "generationConfig.responseLogprobs", "description": "not supported"}
                        ]
                    }
                ],
            }
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "gemini camel top",
        400,
        {"error": {"code": 400, "message": "topLogprobs must be in the range [0, 5]", "status": "INVALID_ARGUMENT"}},
        {"top_logprobs": 5},
    ),
    (
        "vertex",
        400,
        {
            "error": {
                "code": 400,
                "message": "Unable to submit request because it has a logprobs value of 20 but the supported range is from 0 (inclusive) to 6 (exclusive). Update the value and try again.",
                "status": "INVALID_ARGUMENT",
            }
        },
        {"top_logprobs": 5},
    ),
    (
        "mistral",
        422,
        {
            "object": "error",
            "message": {"detail": [detail("logprobs")]},
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "mistral new",
        422,
        {
            "object": "Error",
            "detail": [detail("top_logprobs")],
            "message": [detail("top_logprobs")],
            "type": "invalid_request_error",
            "code": 3001,
        },
        {"top_logprobs": None},
    ),
    (
        "mistral str",
        422,
        {
            "object": "error",
            "message": '{"detail":[{"type":"extra_forbidden","loc":["body","logprobs"],"msg":"Extra inputs are not permitted","input":0.0}]}',
            "type": "internal_error_proxy",
            "param": None,
            "code": "1000",
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    ("deepseek", 400, {"detail": "Invalid top_logprobs and logprobs value"}, {"logprobs": None, "top_logprobs": None}),
    (
        "deepseek max",
        400,
        {
            "error": {
                "message": "Invalid max_tokens value, the valid range of max_tokens is [1, 32]",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_request_error",
            }
        },
        {"max_tokens": 32},
    ),
    (
        "anthropic",
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "max_tokens: 64 > 32, which is the maximum allowed number of output tokens for claude-3",
            },
        },
        {"max_tokens": 32},
    ),
    (
        "anthropic dep",
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "`temperature` is deprecated for this model."},
        },
        {"temperature": None},
    ),
    (
        "litellm",
        400,
        {
            "error": {
                "message": "litellm.UnsupportedParamsError: gpt-5 models (including gpt-5-codex) don't support temperature=0.0. Only temperature=1 is supported. For gpt-5.1, temperature is supported when reasoning_effort='none'. To drop unsupported params set litellm.drop_params = True.",
                "type": "None",
                "param": None,
                "code": "400",
            }
        },
        {"temperature": None},
    ),
    (
        "litellm2",
        400,
        {
            "error": {
                "message": "litellm.UnsupportedParamsError: together_ai does not support parameters: {'logprobs': True}, for model=m. To drop these, set `litellm.drop_params=True`",
                "type": "None",
                "param": "None",
                "code": "400",
            }
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "openrouter raw",
        400,
        {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {
                    "raw": '{\n "error": {\n "message": "Invalid \'top_logprobs\': 20. Expected an integer in range [0, 5]",\n "param": "top_logprobs"}}',
                    "provider_name": "OpenAI",
                },
            }
        },
        {"top_logprobs": 5},
    ),
    (
        "groq",
        400,
        {"error": {"message": "`logprobs` is not supported with this model", "type": "invalid_request_error"}},
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "together",
        400,
        {
            "message": "20 is greater than the maximum of 1 - 'logprobs'",
            "type": "invalid_request_error",
            "param": "logprobs",
            "code": None,
        },
        {"top_logprobs": 1},
    ),
    (
        "xai",
        400,
        {"code": "Client specified an invalid argument", "error": "Argument not supported on this model: logprobs"},
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "fireworks",
        400,
        {
            "error": {
                "object": "error",
                "type": "invalid_request_error",
                "message": "Extra inputs are not permitted, field: 'top_logprobs', value: 20",
            }
        },
        {"top_logprobs": None},
    ),
    (
        "lmdeploy",
        400,
        {
            "message": "Logprobs or top_logprobs requested but not enabled logprobs_mode in engine configuration.",
            "type": "invalid_request_error",
            "code": 400,
            "param": None,
            "object": "error",
        },
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "dashscope",
        400,
        {
            "error": {
                "code": "invalid_parameter_error",
                "param": None,
                "message": "<400> InternalError.Algo.InvalidParameter: Invalid 'top_logprobs': 20. Expected an integer in range [0, 5]",
                "type": "invalid_request_error",
            }
        },
        {"top_logprobs": 5},
    ),
    ("max 5 text", 400, "max 5 logprobs", {"top_logprobs": 5}),
    (
        "moonshot",
        400,
        {
            "error": {
                "message": "invalid temperature: only 1 is allowed for this model",
                "type": "invalid_request_error",
            }
        },
        {"temperature": None},
    ),
    (
        "bedrock",
        400,
        {"message": "extraneous key [logprobs] is not permitted"},
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "500 field",
        500,
        {"error": {"message": "logprobs is not implemented", "type": "server_error", "code": 500}},
        {"logprobs": None, "top_logprobs": None},
    ),
    (
        "upper",
        400,
        {"ERROR": {"MESSAGE": "LOGPROBS NOT SUPPORTED", "PARAM": "LOGPROBS"}},
        {"logprobs": None, "top_logprobs": None},
    ),
    ("max fewer no num", 400, {"error": {"message": "top_logprobs is too large"}}, {"top_logprobs": 5}),
    (
        "zhipu temp",
        400,
        {"error": {"code": "1210", "message": "temperature must be in (0.0, 1.0)"}},
        {"temperature": 0.01},
    ),
]


CAUSE_OF: list[tuple[int, Any, str]] = [
    (404, "404 page not found", "address"),
    (404, {"error": {"message": 'model "m" not found, try pulling it first', "type": "api_error"}}, "model"),
    (404, {"error": {"code": "404", "message": "Resource not found"}}, "address"),
    (
        404,
        {
            "error": {
                "code": "DeploymentNotFound",
                "message": "The API deployment for this resource does not exist. If you created the deployment within the last 5 minutes, please wait a moment and try again.",
            }
        },
        "model",
    ),
    (
        404,
        {
            "object": "error",
            "message": "The model `m` does not exist.",
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        },
        "model",
    ),
    (404, {"detail": "Not Found"}, "address"),
    (404, "", "address"),
    (
        404,
        {
            "error": {
                "message": "The model `gpt-99` does not exist or you do not have access to it.",
                "type": "invalid_request_error",
                "param": None,
                "code": "model_not_found",
            }
        },
        "model",
    ),
    (404, {"error": {"message": "No endpoints found for foo/bar.", "code": 404}}, "model"),
    (400, {"error": {"message": "foo/bar is not a valid model ID", "code": 400}}, "model"),
    (404, {"error": {"message": "No endpoints found that support image input", "code": 404}}, "image"),
    (403, {"error": {"message": "no"}}, "forbidden"),
    (401, {"error": {"message": "x"}}, "key"),
    (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "API key not valid. Please pass a valid API key.",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        "key",
    ),
    (
        403,
        {
            "error": {
                "message": "Your chosen model requires moderation and your input was flagged",
                "code": 403,
                "metadata": {"reasons": ["x"]},
            }
        },
        "filtered",
    ),
    (
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
                "param": "prompt",
                "code": "content_filter",
                "status": 400,
            }
        },
        "filtered",
    ),
    (
        429,
        {
            "error": {
                "message": "You exceeded your current quota, please check your plan and billing details.",
                "type": "insufficient_quota",
                "param": None,
                "code": "insufficient_quota",
            }
        },
        "quota",
    ),
    (
        429,
        {
            "error": {
                "message": "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000. Please try again in 6.2s.",
                "type": "tokens",
                "code": "rate_limit_exceeded",
            }
        },
        "busy",
    ),
    (
        200,
        {"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "Too Many Requests"}}},
        "busy",
    ),
    (200, {"id": "gen-1", "error": {"message": "Upstream error: Service temporarily overloaded", "code": 502}}, "busy"),
    (
        500,
        {"error": {"code": 500, "message": "image input is not supported by this server", "type": "server_error"}},
        "image",
    ),
    (
        500,
        {
            "error": {
                "code": 500,
                "message": "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
                "type": "server_error",
            }
        },
        "image",
    ),
    (
        400,
        {
            "object": "error",
            "message": "At most 0 image(s) may be provided in one prompt.",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
        "image",
    ),
    (
        400,
        {
            "error": {
                "message": "Failed to deserialize the JSON body into the target type: messages[0]: unknown variant `image_url`, expected `text` at line 1 column 310",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_request_error",
            }
        },
        "image",
    ),
    (413, "<html><head><title>413 Request Entity Too Large</title></head></html>", "size"),
    (
        400,
        {
            "object": "error",
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context length is 2048 tokens and your request has 2020 input tokens (64 > 2048 - 2020).",
            "type": "BadRequestError",
            "param": "max_tokens",
            "code": 400,
        },
        "context",
    ),
    (500, "<html>GET / Authorization</html>", "broken"),
    (503, "upstream connect error", "broken"),
    (400, {"error": {"message": "bad request"}}, "other"),
    (400, "<html><body>The plain HTTP request was sent to HTTPS port</body></html>", "scheme"),
    (402, {"error": {"message": "Insufficient credits", "code": 402}}, "quota"),
    (400, {"error": {"message": "this model does not support image input"}}, "image"),
    (500, {"error": {"message": "oops"}}, "broken"),
    (429, {"error": {"message": "slow down"}}, "busy"),
    (404, {"error": {"message": "no such model"}}, "model"),
    (
        404,
        {
            "error": {
                "code": 404,
                "message": "models/gemini-9 is not found for API version v1main, or is not supported for generateContent.",
                "status": "NOT_FOUND",
            }
        },
        "model",
    ),
    (
        429,
        {
            "error": {
                "code": 429,
                "message": "You exceeded your current quota, please check your plan and billing details. Please retry in 17.3s.",
                "status": "RESOURCE_EXHAUSTED",
                "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "17s"}],
            }
        },
        "busy",
    ),
    (200, {"base_resp": {"status_code": 1004, "status_msg": "authentication failed"}}, "key"),
    (200, {"object": "error", "message": "internal", "code": 500}, "broken"),
    (500, {"detail": "CUDA out of memory"}, "broken"),
    (
        400,
        {
            "error": {
                "message": "Invalid 'messages[0].content[0].image_url'",
                "param": "messages[0].content[0].image_url.url",
            }
        },
        "other",
    ),
]


@pytest.mark.parametrize(("name", "status", "body", "steps"), STEPS, ids=[case[0] for case in STEPS])
def test_23_the_smallest_step_down(name: str, status: int, body: Any, steps: dict[str, Any]) -> None:
    assert weaker(SENT, read_refusal(status, body)) == steps


@pytest.mark.parametrize("shape", ["list", "text", "nested", "upper", "bytes in text"])
def test_23_the_form_does_not_matter(shape: str) -> None:
    import json

    for name, status, body, steps in STEPS:
        if isinstance(body, str):
            continue
        made = {
            "list": [body],
            "text": json.dumps(body),
            "nested": {"error": {"message": f"litellm.BadRequestError: {json.dumps(body)}", "code": "400"}},
            "upper": body,
            "bytes in text": f"Error code: 400 - {body!r}",
        }[shape]
        assert weaker(SENT, read_refusal(status, made)) == steps, name


@pytest.mark.parametrize(("status", "body", "cause"), CAUSE_OF)
def test_24_causes(status: int, body: Any, cause: str) -> None:
    found = read_refusal(status, body)
    assert found.cause == cause
    assert found.passing == (cause in ("busy", "broken"))


def test_steps_go_down_and_come_to_an_end() -> None:
    """Whatever a server says, a dozen steps lead to a request without the field, or to none at all."""
    sent, seen = dict(SENT), []
    for _ in range(12):
        steps = weaker(sent, read_refusal(400, {"error": {"message": "Unsupported", "param": "top_logprobs"}}))
        if not steps:
            break
        seen.append(steps)
        sent = {name: value for name, value in {**sent, **steps}.items() if value is not None}
    assert seen == [{"top_logprobs": None}] and "logprobs" in sent
    many = {"error": {"message": "top_logprobs is too large"}}
    first = weaker(SENT, read_refusal(400, many))
    second = weaker({**SENT, **first}, read_refusal(400, many))
    assert (first, second) == ({"top_logprobs": 5}, {"top_logprobs": 1})
    assert weaker({**SENT, "top_logprobs": 1}, read_refusal(400, many)) == {"top_logprobs": None}


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "messages[0]: a text is needed", "param": "messages[0].content"}},
        {"error": {"message": "prompt_logprobs is not supported"}},
        {"error": {"message": "Rate limit reached; reduce max_tokens", "code": "rate_limit_exceeded"}, "status": 429},
        {"error": {"message": "something", "request": {"logprobs": "is not supported"}}},
        {
            "detail": [
                {"loc": ["body", "messages", 0], "msg": "bad", "input": {"logprobs": True, "temperature": "invalid"}}
            ]
        },
        "The temperature in the machine room is 31 degrees",
        None,
        17,
        [],
        {"error": None},
        {"a": {"b": {"c": [[[["logprobs"]]]]}}},
    ],
)
def test_what_names_no_field_drops_none(body: Any) -> None:
    assert weaker(SENT, read_refusal(400, body)) == {}


def test_a_dump_of_the_request_in_an_error_500_drops_nothing() -> None:
    dump = "Internal error in ChatCompletionRequest(" + "x=1, " * 100 + "logprobs=True, temperature=0.0 is invalid)"
    assert read_refusal(500, {"error": {"message": dump}}).passing


def test_waits_that_stand_in_the_body() -> None:
    google = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "17.5s"}]}}
    assert read_refusal(429, google).wait_s == 17.5
    assert read_refusal(429, {"error": {"message": "Please try again in 620ms."}}).wait_s == 0.62
    assert read_refusal(429, {"error": {"message": "slow down"}}).wait_s is None


def test_limits() -> None:
    assert bounds_in("must be in (0.0, 1.0)") == Bounds(0, 1, True, True)
    assert bounds_in("between 0 and 5") == Bounds(0, 5)
    assert bounds_in("expected a value >= 16") == Bounds(low=16)
    assert bounds_in("must be less than 6").nearest(20, 1) == 5
    assert bounds_in("must be greater than 0").nearest(0, 0.01) == 0.01
    assert bounds_in("(2, 1)").nearest(0, 1) is None


def test_what_is_an_error_inside_a_200() -> None:
    for body in (
        {"error": {"code": 429}},
        {"object": "error"},
        {"detail": "x"},
        {"choices": [{"error": {"code": 502}}]},
    ):
        assert error_inside(body)
    fine = {"choices": [{"message": {"content": "Yes"}}]}
    for body in (fine, {**fine, "error": None}, {"unexpected": True}, [], None, "text", {"choices": []}):
        assert not error_inside(body)


def test_likely_addresses() -> None:
    assert likely_address("http://127.0.0.1:11434") == "http://127.0.0.1:11434/v1"
    assert likely_address("https://generativelanguage.googleapis.com/v1").endswith("/v1beta/openai")
    assert len({row.name for row in PROVIDERS}) == len(PROVIDERS) >= 13
