"""From rows on disk to the micro-batches of a step.

reading    files -> records, each with its line     (knows files; strict: JSON; parquet: the extra)
formats    record -> row of messages                (knows fields)
template   messages -> segments of text             (knows prompts; chat_template compares them with the model's own, in a sandbox)
tokenizer  segments -> ids and a mask               (knows vocabularies)
dataset    ids and masks of all rows, cached        (knows nothing of ranks)
plan       lengths -> which rows form which step    (a pure function)
loader     a step's share of a rank -> tensors
"""
