"""What the openai package makes of a device's HTTP door: python check.py URL KEY

Every answer has to be what the package's own types want (strict), and every error the exception that stands for its
status. Prints one line for each thing that was seen.
"""

import sys
import threading
import urllib.request

import openai
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

URL, KEY = sys.argv[1:]
HELLO = [{"role": "user", "content": "Say hello in one sentence."}]
LONG = [{"role": "user", "content": "Write a very long story about a wagtail."}]


def strict(value):
    """The package builds its types without looking; here they are looked at."""
    return type(value).model_validate(value.model_dump(exclude_unset=True), strict=True)


def raises(kind, code, **request):
    try:
        client.chat.completions.create(**request)
    except openai.APIStatusError as error:
        assert type(error) is kind and error.code == code, (type(error), error.code, error)
        assert error.body["message"], error
        print(f"{kind.__name__} {code}")
        return error
    raise AssertionError(f"{code} did not come")


def metric(name):
    request = urllib.request.Request(f"{URL}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as response:
        page = response.read().decode()
    samples = {sample.name: sample for family in text_string_to_metric_families(page) for sample in family.samples}
    return samples[name].value


client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
models = client.models.list()
model = models.data[0].id
assert isinstance(strict(models.data[0]), Model)
assert client.models.retrieve(model).id == model
print(f"model {model}")

whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0)
assert isinstance(strict(whole), ChatCompletion)
text = whole.choices[0].message.content
assert text and whole.usage.completion_tokens <= 24 and whole._request_id == whole.id
assert whole.ai_generated is True and len(whole.model_sha256) == 64
print("whole")

chunks = list(client.chat.completions.create(
    model=model, messages=HELLO, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}))
for chunk in chunks:
    assert isinstance(strict(chunk), ChatCompletionChunk) and chunk.ai_generated is True, chunk
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
print(f"{len(chunks)} chunks")

# The package's own way of gathering a stream, which is strict about the order of events.
with client.chat.completions.stream(model=model, messages=HELLO, max_tokens=24, temperature=0) as stream:
    for event in stream:
        pass
    assert stream.get_final_completion().choices[0].message.content == text
print("stream helper")


class Light(BaseModel):
    room: str
    on: bool


light = client.chat.completions.parse(
    model=model, messages=[{"role": "user", "content": "Turn on the light in the kitchen."}], response_format=Light,
    max_tokens=60, temperature=0)
assert isinstance(light.choices[0].message.parsed, Light), light
print(f"schema {light.choices[0].message.content}")

raises(openai.BadRequestError, "invalid_request", model=model, messages=HELLO, logprobs=True)
raises(openai.BadRequestError, "invalid_request", model=model, messages=HELLO, n=2, stream=True)
raises(openai.APIStatusError, "too_large", model=model, messages=[{"role": "user", "content": "x" * 300_000}])
raises(openai.InternalServerError, "expired", model=model, messages=HELLO, extra_body={"deadline_ms": 0})
try:
    openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0).models.list()
    raise AssertionError("a wrong key is let in")
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key"
    print("AuthenticationError")

# A stream that is closed is taken back. The device has one slot and room for two that wait.
stream = client.chat.completions.create(model=model, messages=LONG, max_tokens=2000, stream=True)
next(iter(stream))
waiting = [threading.Thread(target=lambda: client.chat.completions.create(model=model, messages=HELLO, max_tokens=2))
           for _ in range(8)]
refused = []
threading.excepthook = lambda failure: refused.append(failure.exc_value)
for thread in waiting:
    thread.start()
while not refused:
    assert any(thread.is_alive() for thread in waiting), "the queue takes everything"
    waiting[0].join(0.05)
stream.close()
for thread in waiting:
    thread.join()
assert refused and all(isinstance(error, openai.RateLimitError) for error in refused), refused
assert all(error.code == "queue_full" for error in refused), refused
print(f"RateLimitError queue_full, {len(refused)} of {len(waiting)}")
answers = metric("pipit_answers_total")
assert metric("pipit_requests_running") == 0
# The long story is not among them.
assert answers == 4 + len(waiting) - len(refused), answers
print(f"{answers:.0f} answers")
