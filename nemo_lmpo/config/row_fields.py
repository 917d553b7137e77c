"""What a row's fields are called in the layouts that are read: what `data.train.columns` may map columns to."""

PAIR_FIELDS = ("prompt", "chosen", "rejected")
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
ANSWER_LISTS = ("responses", "completions", "answers", "candidates")
SCORE_LISTS = ("scores", "ratings", "rewards")
RANK_LISTS = ("ranks", "rankings", "rank")
COMPLETION_FIELDS = ("completion", "label")
INSTRUCTION_FIELDS = ("instruction", "input", "output")
CONVERSATION_SCHEMAS = ("conversation", "completion", "instruction")
"""Layouts of `data.train.schema` whose rows have no rejected answer."""
IN_EVERY_LAYOUT = ("prompt_id", "id", "system", "history", "tools", "chat_template_kwargs")
"""Columns that have the same meaning in every layout."""
ABOUT_OWN_PAIRS = ("score_chosen", "score_rejected", "tokens_chosen", "tokens_rejected", "candidates")
"""Columns in which `nemo-lmpo pairs` keeps how a pair came about. A row that has all of them is one of its rows."""
ROW_FIELDS = (
    *(*PAIR_FIELDS, *COMPLETION_FIELDS, *CONVERSATION_FIELDS, *INSTRUCTION_FIELDS),
    *(*ANSWER_LISTS, *SCORE_LISTS, *RANK_LISTS, *IN_EVERY_LAYOUT),
)
