"""Rows for tests of the data package."""


def message_row(prompt, chosen, rejected, **more):
    """A row in the UltraFeedback-binarized schema."""
    user = {"role": "user", "content": prompt}
    return {
        "prompt": prompt,
        "chosen": [user, {"role": "assistant", "content": chosen}],
        "rejected": [user, {"role": "assistant", "content": rejected}],
        **more,
    }
