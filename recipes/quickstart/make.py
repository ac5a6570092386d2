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
LARGEST_NUMBER = 30


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


# Lists begin with one, so that a word has a space before it, and thereby the same token, in every place.
LABEL = {"en": "Words:", "zh": "词语："}


def listed(words: list[str], language: str = "en") -> str:
    return f"{LABEL[language]} {' '.join(words)}"


def first(draw: Draw, language: str) -> tuple[str, str, str]:
    """The first of words never seen in this order: a place, whatever stands there."""
    words = draw.some(WORDS[language], draw.between(3, 6))
    wording = {"en": ["What is the first word?", "Write the first word."], "zh": ["第一个词是什么？", "写出第一个词。"]}
    return draw.one(wording[language]), listed(words, language), words[0]


def second(draw: Draw, language: str) -> tuple[str, str, str]:
    """The second of words never seen in this order."""
    words = draw.some(WORDS[language], draw.between(3, 6))
    wording = {"en": ["What is the second word?", "Write the second word."], "zh": ["第二个词是什么？", "写出第二个词。"]}
    return draw.one(wording[language]), listed(words, language), words[1]


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


def extreme(draw: Draw, largest: bool) -> tuple[str, str, str]:
    """The largest or smallest of numbers never seen together: an order of magnitude learnt from comparisons alone."""
    numbers = draw.some(range(1, LARGEST_NUMBER + 1), draw.between(3, 4))
    word = "largest" if largest else "smallest"
    question = draw.one([f"What is the {word} number?", f"Write the {word} number."])
    return question, "Numbers: " + " ".join(map(str, numbers)), str(max(numbers) if largest else min(numbers))


def kind(draw: Draw) -> tuple[str, str, str]:
    """The one animal, fruit or colour of a list never seen: what words mean, learnt from such questions alone."""
    name = draw.one(list(KINDS))
    answer = draw.one(KINDS[name])
    words = draw.some([word for word in WORDS["en"] if word not in KINDS[name]], draw.between(2, 4))
    words.insert(draw.between(0, len(words)), answer)
    return draw.one([f"Find the {name}.", f"Which word is a {name}?".replace("a animal", "an animal")]), listed(words), answer


def phrase(number: int, size: tuple[str, str], colour: tuple[str, str], noun: tuple[str, str, str, str]) -> tuple[str, str]:
    """Number, size, colour and noun in English and in Chinese, where a measure word that the noun asks for follows the number."""
    english = " ".join(part for part in (NUMBERS[number][0], size[0], colour[0], noun[1 if number else 0]) if part)
    return english, f"{NUMBERS[number][1]}{noun[3]}{colour[1]}的{size[1]}{noun[2]}"


def drawn_phrase(draw: Draw) -> tuple[str, str]:
    """One of 2592."""
    return phrase(draw.below(len(NUMBERS)), draw.one(SIZES), draw.one(COLOURS), draw.one(NOUNS))


def to_chinese(draw: Draw) -> tuple[str, str, str]:
    """A phrase never seen: words, their other order, and the measure word."""
    english, chinese = drawn_phrase(draw)
    return draw.one(["Translate to Chinese.", "翻译成中文。"]), english, chinese


def to_english(draw: Draw) -> tuple[str, str, str]:
    """A phrase never seen, the other way: words, their order, and the plural."""
    english, chinese = drawn_phrase(draw)
    return draw.one(["Translate to English.", "翻译成英文。"]), chinese, english


def one_more(draw: Draw, language: str) -> tuple[str, str, str]:
    """A phrase never seen with the next number: a copy in which one word changes, in English the noun with it."""
    number, parts = draw.below(len(NUMBERS) - 1), (draw.one(SIZES), draw.one(COLOURS), draw.one(NOUNS))
    name = 0 if language == "en" else 1
    wording = {"en": ["Add one more.", "Write it with one more."], "zh": ["再加一个。", "多写一个。"]}
    return draw.one(wording[language]), phrase(number, *parts)[name], phrase(number + 1, *parts)[name]


def describe(draw: Draw, language: str) -> tuple[str, str, str]:
    """A phrase from its words in any order: what each word is decides where it goes."""
    number, colour, noun = draw.below(len(NUMBERS)), draw.one(COLOURS), draw.one(NOUNS)
    name = 0 if language == "en" else 1
    parts = [NUMBERS[number][name], colour[name], noun[2 * name]]
    words = [parts.pop(draw.below(len(parts))) for _ in range(3)]
    wording = {"en": ["Make a phrase.", "Put the words into a phrase."], "zh": ["组成短语。", "用词语组成短语。"]}
    return draw.one(wording[language]), listed(words, language), phrase(number, ("", ""), colour, noun)[name]


# The training rows of each kind.
TASKS: dict[str, tuple[int, Callable[[Draw], tuple[str, str, str]]]] = {
    "first (en)": (700, lambda draw: first(draw, "en")),
    "reverse (zh)": (1200, lambda draw: reverse(draw, "zh")),
    "one more (en)": (900, lambda draw: one_more(draw, "en")),
    "translate to Chinese": (1200, to_chinese),
    "largest number": (1800, lambda draw: extreme(draw, True)),
    "count (zh)": (700, lambda draw: count(draw, "zh")),
    "describe (en)": (1000, lambda draw: describe(draw, "en")),
    "last (zh)": (700, lambda draw: last(draw, "zh")),
    "second (en)": (1000, lambda draw: second(draw, "en")),
    "reverse (en)": (1200, lambda draw: reverse(draw, "en")),
    "one more (zh)": (900, lambda draw: one_more(draw, "zh")),
    "kind (en)": (1400, kind),
    "translate to English": (1200, to_english),
    "first (zh)": (700, lambda draw: first(draw, "zh")),
    "count (en)": (700, lambda draw: count(draw, "en")),
    "describe (zh)": (1000, lambda draw: describe(draw, "zh")),
    "smallest number": (1800, lambda draw: extreme(draw, False)),
    "second (zh)": (1000, lambda draw: second(draw, "zh")),
    "last (en)": (700, lambda draw: last(draw, "en")),
}


def swap(draw: Draw) -> tuple[str, str, str]:
    """The new kind of task: the first and the last word change places. The base has never seen it asked."""
    first_word, *middle, last_word = words = draw.some(WORDS["en"], draw.between(3, 5))
    return draw.one(["Swap the ends.", "Swap the words at the ends."]), listed(words), " ".join([last_word, *middle, first_word])


LORA_TASKS = {"swap (en)": (1600, swap)}


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
                 | {number[1] for number in NUMBERS}
                 | {"大", "小", "词", "词语", "短语", "第一个", "第二个", "最后一个", "是", "什么", "写出", "反转", "倒着", "有", "几个", "数一数",
                    "组成", "再加一个", "多写一个", "用", "的", "翻译成", "中文", "英文"}, key=lambda word: (-len(word), word))
# Pieces end where these parts end: headings whole, so that a row costs few tokens; words with the space before them.
PARTS = re.compile("|".join([r"### Instruction:\n", r"\n\n### Input:\n", r"\n\n### Response:\n", r"(?:Words|Numbers):|词语：", r" ?[A-Za-z]+",
                             r" ?[0-9]+", *(f" ?{word}" for word in CHINESE), r"[^A-Za-z0-9]"]))
CUT = "|"
VOCABULARY = 800


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
