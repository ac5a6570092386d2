"""From bytes on disk to the micro-batches of a step.

reading    bytes -> records with their line             (knows files; strict: JSON that means one thing; parquet)
formats    record -> messages                           (knows what rivals' files look like)
template   messages -> segments of text                 (knows prompts; chat_template compares them with the model's own, in a sandbox)
tokenizer  segments -> ids and what is learnt           (knows vocabularies)
build      a file -> arrays, by several processes       (cache: where they are and whether they are still the file's)
dataset    arrays -> documents, cut and mixed           (ledger: what became of every row)
plan       lengths -> which documents form which step   (a pure function)
loader     a step's share of a rank -> tensors          (in the background)
checks     what may be wrong with rows                    (by the arrays; texts looks at the text, view shows documents token by token)
"""
