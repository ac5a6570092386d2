"""From rows on disk to the micro-batches of a step.

formats    JSONL row -> messages                    (knows files)
template   messages -> segments of text             (knows prompts; chat_template compares them with the model's own, in a sandbox)
tokenizer  text -> ids                              (knows vocabularies)
dataset    segments -> ids and a mask, cached       (knows nothing of ranks)
plan       lengths -> which rows form which step    (a pure function)
loader     a step's share of a rank -> tensors
checks     what may be wrong with rows              (by the arrays; texts looks at the text, view shows documents token by token)
"""
