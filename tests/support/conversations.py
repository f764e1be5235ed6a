"""Random conversations with system messages, tools, calls, results and reasoning, from a seed."""

from random import Random

from nesso_tune.conversation import Conversation, Message

TEXT = (
    "il la perché città è così però già dopo Torino quando the answer is weather today 42 3,14 € «sì» it's x = y + "
    '1; print(x) naïve 東京 🙂 <b> & {} "no"'
)
WORDS = TEXT.split()


def conversations(seed, count, tools=True, reasoning=True, edges=True):
    """`count` conversations that begin with a user turn and end with an answer.

    Args:
        seed: of the random draws.
        count: number of conversations.
        tools: some offer tools, call them and get results.
        reasoning: some answers have reasoning.
        edges: some contents begin or end with white space.
    """
    rng = Random(seed)
    return [_conversation(rng, tools, reasoning, edges) for _ in range(count)]


def _conversation(rng, tools, reasoning, edges):
    offered = tuple(_tool(rng, i) for i in range(rng.randint(1, 3))) if tools and rng.random() < 0.5 else ()
    messages = [Message("system", _text(rng, edges and "end"))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages.append(Message("user", _text(rng, edges)))
        for _ in range(rng.randint(0, 2) if offered else 0):
            calls = tuple(
                {"name": rng.choice(offered)["function"]["name"], "arguments": _arguments(rng)}
                for _ in range(rng.randint(1, 2))
            )
            content = "" if rng.random() < 0.5 else _text(rng, edges)
            messages.append(Message("assistant", content, calls, reasoning=_thought(rng, reasoning, edges)))
            messages += [Message("tool", _text(rng, False)) for _ in calls]
        messages.append(Message("assistant", _text(rng, edges), reasoning=_thought(rng, reasoning, edges)))
    return Conversation(tuple(messages), offered)


def _text(rng, edges):
    between = (" ", " ", " ", "\n", "\n\n", ", ")
    text = "".join(rng.choice(WORDS) + rng.choice(between) for _ in range(rng.randint(1, 9))).strip()
    if edges and rng.random() < 0.1:
        text += rng.choice((" ", "\n"))
    if edges is True and rng.random() < 0.1:
        text = rng.choice((" ", "\n", "\n\n")) + text
    return text


def _thought(rng, reasoning, edges):
    return _text(rng, edges) if reasoning and rng.random() < 0.5 else None


def _tool(rng, number):
    names = rng.sample(("luogo", "città"), 2)
    properties = {name: {"type": "string", "description": _text(rng, False)} for name in names}
    parameters = {"type": "object", "properties": properties, "required": ["luogo"]}
    if rng.random() < 0.3:
        parameters["additionalProperties"] = False
    name = f"{rng.choice(('meteo', 'orario', 'search_docs'))}_{number}"
    return {"type": "function", "function": {"name": name, "description": _text(rng, False), "parameters": parameters}}


def _arguments(rng):
    values = (lambda: _text(rng, False), lambda: rng.randint(-5, 99), lambda: rng.random() < 0.5, lambda: None,
              lambda: [1.5, {"è": "<x>"}])  # fmt: skip
    return {f"arg_{i}": rng.choice(values)() for i in range(rng.randint(0, 3))}
