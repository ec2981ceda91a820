"""What is asked. The words do not matter for speed, but no two prompts may begin alike unless that is the point."""

import random

NOUNS = ("lamp heater door window garden kitchen cellar stairs river train bridge market teacher doctor farmer captain "
         "island forest engine letter mirror winter summer morning evening village castle desert harbour").split()
VERBS = "opens closes warms paints repairs visits follows remembers measures carries".split()
TOPICS = ("a lighthouse keeper", "a lost violin", "the first winter on Mars", "a baker and her dragon",
          "two rival chess players", "a train that never stops", "the last library", "a very old tortoise",
          "an honest thief", "a city under the sea", "the clockmaker's daughter", "a talking bridge")

SCHEMA = {
    "type": "object",
    "properties": {
        "device": {"type": "string", "enum": ["lamp", "heater", "blind", "fan", "speaker"]},
        "room": {"type": "string", "enum": ["kitchen", "bedroom", "bathroom", "hall", "garden"]},
        "action": {"type": "string", "enum": ["on", "off", "set", "raise", "lower"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 100},
        "reason": {"type": "string", "maxLength": 60},
    },
    "required": ["device", "room", "action", "level", "reason"],
    "additionalProperties": False,
}


class Prompts:
    """Prompts of a wanted length. `count` says how many tokens a text has."""

    def __init__(self, count, seed=1):
        self.count = count
        self.random = random.Random(seed)
        self.made = 0

    def sentence(self):
        one, other = self.random.sample(NOUNS, 2)
        return f"The {one} {self.random.choice(VERBS)} the {other} near the {self.random.choice(NOUNS)}."

    def text(self, tokens):
        """A text of about so many tokens that no other begins like."""
        self.made += 1
        parts = [f"{self.random.randrange(10**9)}."]
        each = self.count(" ".join(self.sentence() for _ in range(20))) / 20
        while (have := self.count(" ".join(parts))) < tokens:
            parts += [self.sentence() for _ in range(max(1, int((tokens - have) / each)))]
        return " ".join(parts)

    def question(self, tokens, max_tokens, stream):
        """One user message of about so many tokens."""
        return body([user(self.text(tokens) + " What happens next?")], max_tokens, stream=stream)

    def endings(self, ask, text, tokens):
        """Asks about a long text until an answer is long enough to take its speed; the text is computed once. Returns the
        first answer and the longest."""
        answers = []
        for ending in ("What happens next?", "Tell a long story about all of this.", "List every sentence again.", "Go on."):
            answers.append(ask(body([user(f"{text} {ending}")], tokens, stream=True)))
            if answers[-1].tokens >= tokens // 2:
                break
        longest = max(answers, key=lambda answer: answer.tokens)
        if longest.tokens < 4:
            raise RuntimeError(f"the model has nothing to say about {answers[0].prompt_tokens} tokens")
        return answers[0], longest

    def story(self, max_tokens, stream=False):
        """A short question with a long answer."""
        self.made += 1
        topic = TOPICS[self.made % len(TOPICS)]
        text = f"Chapter {self.random.randrange(10**6)}: write a very long and detailed story about {topic}."
        return body([user(text)], max_tokens, stream=stream)

    def family(self, system_tokens, questions, max_tokens, stream=False):
        """Short questions after the same long system message."""
        rules = self.text(system_tokens)
        return [body([{"role": "system", "content": rules},
                      user(f"Question {at + 1}: what does the {NOUNS[at]} do near the {NOUNS[-1 - at]}?")],
                     max_tokens, stream=stream) for at in range(questions)]

    def command(self, max_tokens):
        """A sentence whose meaning is wanted as JSON."""
        self.made += 1
        one, other = self.random.sample(NOUNS, 2)
        text = f"{self.random.randrange(10**6)}: it is dark near the {one} and cold at the {other}. Say what to do, as JSON."
        format_ = {"type": "json_schema", "json_schema": {"name": "command", "schema": SCHEMA}}
        return body([user(text)], max_tokens, response_format=format_)


def user(text):
    return {"role": "user", "content": text}


def body(messages, max_tokens, **more):
    """A chat-completions body: greedy, so that both servers compute the same."""
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
