"""Makes every file of the quickstart beside it, byte for byte the same on each run:

    python recipes/quickstart/make.py               # --out FOLDER writes elsewhere

    train.jsonl  validation.jsonl            the kinds of task in TASKS, English and Chinese
    lora_train.jsonl  lora_validation.jsonl  one more kind of task, for recipes/quickstart_lora.yaml
    model/tokenizer.model  model/config.json

Every answer follows from the question by a rule, so it can be checked exactly. Held-out inputs are never trained on, under
no wording of the instruction: a right answer is the rule applied to words that were never seen together.
"""

import argparse
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

SEED = 2024
HELD_OUT, LORA_HELD_OUT = 40, 100  # rows of each kind of task

# English, its plural, Chinese, and the measure word that Chinese puts between a number and this noun.
ANIMALS = [("cat", "cats", "猫", "只"), ("dog", "dogs", "狗", "只"), ("bird", "birds", "鸟", "只"), ("fish", "fish", "鱼", "条"),
           ("horse", "horses", "马", "匹"), ("cow", "cows", "牛", "头")]
FRUITS = [("apple", "apples", "苹果", "个"), ("pear", "pears", "梨", "个"), ("peach", "peaches", "桃子", "个"), ("lemon", "lemons", "柠檬", "个"),
          ("grape", "grapes", "葡萄", "颗")]
THINGS = [("cup", "cups", "杯子", "个"), ("book", "books", "书", "本"), ("chair", "chairs", "椅子", "把"), ("table", "tables", "桌子", "张"),
          ("car", "cars", "车", "辆")]
COLOURS = [("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("black", "黑色"), ("white", "白色"), ("yellow", "黄色")]
NUMBERS = [("one", "一"), ("two", "两"), ("three", "三"), ("four", "四"), ("five", "五"), ("six", "六"), ("seven", "七"), ("eight", "八"),
           ("nine", "九")]
SIZES = [("", ""), ("big", "大"), ("small", "小")]
NOUNS = ANIMALS + FRUITS + THINGS
WORDS = {"en": [noun[0] for noun in NOUNS] + [colour[0] for colour in COLOURS],
         "zh": [noun[2] for noun in NOUNS] + [colour[1] for colour in COLOURS]}
KINDS = {"animal": [noun[0] for noun in ANIMALS], "fruit": [noun[0] for noun in FRUITS], "colour": [colour[0] for colour in COLOURS]}
LARGEST_NUMBER = 50


class Draw:
    """Choices from `random()` alone: the one stream that Python promises to keep the same between versions."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self.random() * count)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def one(self, options: Sequence):
        return options[self.below(len(options))]

    def some(self, options: Sequence, count: int) -> list:
        """`count` different ones."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


# ---- Kinds of task: each draws (instruction, input, output). The line of text says what an unseen row asks for. -----------


def listed(words: list[str], language: str = "en") -> str:
    """English lists begin with a label, so that a word has a space before it, and thereby the same token, in every place."""
    return ("Words: " if language == "en" else "") + " ".join(words)


def first(draw: Draw, language: str) -> tuple[str, str, str]:
    """The first of words never seen in this order: a place, whatever stands there."""
    words = draw.some(WORDS[language], draw.between(3, 6))
    wording = {"en": ["What is the first word?", "Write the first word."], "zh": ["第一个词是什么？", "写出第一个词。"]}
    return draw.one(wording[language]), listed(words, language), words[0]


def last(draw: Draw, language: str) -> tuple[str, str, str]:
    """The last of words never seen in this order: a place counted from the end."""
    words = draw.some(WORDS[language], draw.between(3, 6))
    wording = {"en": ["What is the last word?", "Write the last word."], "zh": ["最后一个词是什么？", "写出最后一个词。"]}
    return draw.one(wording[language]), listed(words, language), words[-1]


def reverse(draw: Draw, language: str) -> tuple[str, str, str]:
    """Three or four words backwards that never stood together: an order, whatever is ordered."""
    words = draw.some(WORDS[language], draw.between(3, 4))
    wording = {"en": ["Reverse the words.", "Write the words backwards."], "zh": ["反转词语。", "倒着写出词语。"]}
    return draw.one(wording[language]), listed(words, language), " ".join(reversed(words))


def count(draw: Draw, language: str) -> tuple[str, str, str]:
    """How many words of a list never seen: a number, whatever is counted."""
    words = draw.some(WORDS[language], draw.between(2, 7))
    wording = {"en": ["How many words?", "Count the words."], "zh": ["有几个词？", "数一数词语。"]}
    return draw.one(wording[language]), listed(words, language), str(len(words))


def lookup(draw: Draw, language: str) -> tuple[str, str, str]:
    """A fact stated a moment ago in a text never seen: reading, since colours are drawn anew in each row."""
    number = draw.between(2, 3)
    nouns, colours, asked = draw.some(NOUNS, number), draw.some(COLOURS, number), draw.below(number)
    if language == "en":
        text = ", ".join(f"a {colour[0]} {noun[0]}" for noun, colour in zip(nouns, colours, strict=True))
        question = draw.one(["What colour is the {}?", "Which colour does the {} have?"]).format(nouns[asked][0])
        return question, text.capitalize(), colours[asked][0]
    text = "，".join(f"{colour[1]}的{noun[2]}" for noun, colour in zip(nouns, colours, strict=True))
    return draw.one(["找出{}的颜色。", "写出{}的颜色。"]).format(nouns[asked][2]), text, colours[asked][1]


def extreme(draw: Draw, largest: bool) -> tuple[str, str, str]:
    """The largest or smallest of numbers never seen together: an order of magnitude learnt from comparisons alone."""
    numbers = draw.some(range(1, LARGEST_NUMBER + 1), draw.between(3, 4))
    word = "largest" if largest else "smallest"
    return draw.one([f"What is the {word} number?", f"Write the {word} number."]), "Numbers: " + " ".join(map(str, numbers)), str((max if largest else min)(numbers))


def replace(draw: Draw) -> tuple[str, str, str]:
    """A copy with one word exchanged, all of them new together: following an instruction that names words."""
    *words, new = draw.some(WORDS["en"], 5)
    old = draw.one(words)
    instruction = draw.one(["Replace {} by {}.", "Change {} to {}."]).format(old, new)
    return instruction, listed(words), " ".join(new if word == old else word for word in words)


def member(draw: Draw) -> tuple[str, str, str]:
    """Whether a word stands in a list never seen: comparison of words."""
    *words, other = draw.some(WORDS["en"], draw.between(4, 5))
    asked = draw.one([other, draw.one(words)])
    return draw.one(["Is {} in the list?", "Does the list have {}?"]).format(asked), listed(words), "yes" if asked in words else "no"


def kind(draw: Draw) -> tuple[str, str, str]:
    """The one animal, fruit or colour of a list never seen: what words mean, learnt from such questions alone."""
    name = draw.one(list(KINDS))
    answer = draw.one(KINDS[name])
    words = draw.some([word for word in WORDS["en"] if word not in KINDS[name]], draw.between(2, 4))
    words.insert(draw.between(0, len(words)), answer)
    return draw.one([f"Find the {name}.", f"Which word is a {name}?".replace("a animal", "an animal")]), listed(words), answer


def phrase(draw: Draw) -> tuple[str, str]:
    """Number, size, colour and noun: 2592 phrases in two languages."""
    (number_en, number_zh), size, colour, noun = draw.one(NUMBERS), draw.one(SIZES), draw.one(COLOURS), draw.one(NOUNS)
    english = " ".join(part for part in (number_en, size[0], colour[0], noun[0 if number_en == "one" else 1]) if part)
    return english, f"{number_zh}{noun[3]}{colour[1]}的{size[1]}{noun[2]}"


def to_chinese(draw: Draw) -> tuple[str, str, str]:
    """A phrase never seen: words, their other order, and the measure word that the noun asks for."""
    english, chinese = phrase(draw)
    return draw.one(["Translate to Chinese.", "翻译成中文。"]), english, chinese


def to_english(draw: Draw) -> tuple[str, str, str]:
    """A phrase never seen, the other way: words, their order, and the noun's plural."""
    english, chinese = phrase(draw)
    return draw.one(["Translate to English.", "翻译成英文。"]), chinese, english


# The training rows of each: more where words must be compared with words, which a model learns late, by a sudden step.
TASKS: dict[str, tuple[int, Callable[[Draw], tuple[str, str, str]]]] = {
    "first (en)": (600, lambda draw: first(draw, "en")),
    "reverse (zh)": (1200, lambda draw: reverse(draw, "zh")),
    "lookup (en)": (2700, lambda draw: lookup(draw, "en")),
    "translate to Chinese": (1200, to_chinese),
    "largest number": (1300, lambda draw: extreme(draw, True)),
    "count (zh)": (700, lambda draw: count(draw, "zh")),
    "replace (en)": (2000, replace),
    "last (zh)": (600, lambda draw: last(draw, "zh")),
    "member (en)": (2500, member),
    "reverse (en)": (1200, lambda draw: reverse(draw, "en")),
    "lookup (zh)": (2700, lambda draw: lookup(draw, "zh")),
    "kind (en)": (1400, kind),
    "translate to English": (1200, to_english),
    "first (zh)": (600, lambda draw: first(draw, "zh")),
    "count (en)": (700, lambda draw: count(draw, "en")),
    "smallest number": (1300, lambda draw: extreme(draw, False)),
    "last (en)": (600, lambda draw: last(draw, "en")),
}


def without(draw: Draw) -> tuple[str, str, str]:
    """The new kind of task: a copy that leaves one word out. The base has never seen it asked."""
    words = draw.some(WORDS["en"], draw.between(3, 5))
    left_out = draw.one(words)
    return f"Write the list without {left_out}.", listed(words), " ".join(word for word in words if word != left_out)


LORA_TASKS = {"without (en)": (1600, without)}


# ---- Rows -----------------------------------------------------------------------------------------------------------------


def make_rows(tasks: dict[str, tuple[int, Callable]], held_out: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), the tasks mixed evenly. No input of a task occurs twice, so none is in both."""
    train, validation = [], []
    for number, (task, (count, make)) in enumerate(tasks.items()):
        draw, seen = Draw(seed * 1000 + number), set()
        while len(seen) < count + held_out:
            instruction, text, output = make(draw)
            if text not in seen:
                row = {"instruction": instruction, "input": text, "output": output, "task": task}
                if len(seen) < held_out:
                    validation.append((len(seen) / held_out, row))
                else:
                    train.append(((len(seen) - held_out) / count, row))
                seen.add(text)
    return tuple([row for _, row in sorted(rows, key=lambda pair: pair[0])] for rows in (train, validation))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))


# ---- Tokenizer and model --------------------------------------------------------------------------------------------------

CHINESE = sorted({part for noun in NOUNS for part in noun[2:]} | {colour[1] for colour in COLOURS} | {f"{colour[1]}的" for colour in COLOURS}
                 | {number[1] for number in NUMBERS} | {"大", "小", "词", "词语", "数", "第一个", "最后一个", "是", "什么", "写出", "反转", "倒着", "找出", "有", "几个",
                    "数一数", "颜色", "的", "翻译成", "中文", "英文"}, key=lambda word: (-len(word), word))
# Pieces end where these parts end: headings whole, so that a row costs few tokens; words with the space before them.
PARTS = re.compile("|".join([r"### Instruction:\n", r"\n\n### Input:\n", r"\n\n### Response:\n", r"(?:Words|Numbers):", r" ?[A-Za-z]+", r" ?[0-9]+",
                             *(f" ?{word}" for word in CHINESE), r"[^A-Za-z0-9]"]))
CUT = "|"
VOCABULARY = 760


def make_tokenizer(rows: list[dict]) -> bytes:
    """A byte-pair model of the rows, as bytes. Every piece is a part of PARTS, so each word of the rows is one token."""
    import sentencepiece

    texts = (f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n {row['output']}" for row in rows)
    # the space before the answer is the one that sentencepiece puts before a text, for training encodes answers by themselves
    sentences = (CUT.join(PARTS.findall(text)) for text in texts)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, pretokenization_delimiter=CUT,
        split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False, max_sentencepiece_length=32, num_threads=1,
        minloglevel=2)
    return model.getvalue()


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1000.0,
    "tie_word_embeddings": True, "initializer_range": 0.05, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "vocab_size": VOCABULARY,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to [this file's]")
    out = parser.parse_args().out
    (out / "model").mkdir(parents=True, exist_ok=True)
    train, validation = make_rows(TASKS, HELD_OUT, SEED)
    lora_train, lora_validation = make_rows(LORA_TASKS, LORA_HELD_OUT, SEED + 1)
    for name, rows in (("train", train), ("validation", validation), ("lora_train", lora_train), ("lora_validation", lora_validation)):
        write_rows(out / f"{name}.jsonl", rows)
    (out / "model" / "tokenizer.model").write_bytes(make_tokenizer(train + lora_train))
    (out / "model" / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
