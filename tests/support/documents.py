"""Records of a conversation, and files of them."""

import json

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


def lines(path, *records):
    """Writes JSON lines, and says where."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)
