"""Rows that training tests run on."""

import pytest


@pytest.fixture
def talks(write_rows, chats):
    """Thirty bilingual conversations of different lengths, as a file."""
    rows = []
    for i, row in enumerate(chats * 3):
        question, answer = row["messages"]
        answer = {"role": "assistant", "content": answer["content"] * (1 + i % 3)}
        rows.append(
            {"messages": [{**question, "content": f"{question['content']} ({i})"}, answer], "lang": row["language"]}
        )
    return write_rows(rows, "talks.jsonl")


@pytest.fixture
def pairs(write_rows, chats):
    """Twenty bilingual preference pairs, as a file."""
    rows = [
        {
            "prompt": f"{row['messages'][0]['content']} ({i})",
            "chosen": row["messages"][1]["content"] + (" Altro?" if i % 2 else " Posso aiutarti ancora?"),
            "rejected": row["messages"][1]["content"][: 8 + i],
            "lang": row["language"],
        }
        for i, row in enumerate(chats * 2)
    ]
    return write_rows(rows, "pairs.jsonl")
