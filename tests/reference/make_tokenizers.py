#!/usr/bin/env python3
"""Trains small tokenizers of the shapes that open models use and records what the reference
library makes of a list of strings, for tests/unit/test_tokenizer.c.

    python3 -m venv VENV && VENV/bin/pip install tokenizers==0.22.2
    VENV/bin/python tests/reference/make_tokenizers.py

Writes, under tests/fixtures/tokenizers/:
  strings.jsonl          one JSON string a line
  NAME/tokenizer.json    a tokenizer
  NAME/expected.jsonl    one object a line: n (line of strings.jsonl), ids (no template, special
                         tokens parsed), plain (special tokens as plain text; absent: as ids), bos
                         (with the template; on some lines), text (decoded, special tokens
                         skipped; absent: as the string), all (decoded with them; absent: as text)
  NAME/decode.jsonl      random ids and what they decode to: ids, text, all (absent: as text)
The strings depend on the seed alone. Training breaks ties at random, so that each run makes other
tokenizers of the same shapes, and the test must pass with those of every run. 0.23 decodes an added token with
"normalized" to its normal form, and then no longer takes it for special; lorad does as 0.22 does.
"""

import json
import pathlib
import random
import unicodedata

import tokenizers
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)

VERSION = "0.22.2"
OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "tokenizers"

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.", "All human beings are born free and equal.",
    "I'm sure they'll say we've done it; you'd think he's right, but it isn't.",
    "Größe, Straße, Übermut tut selten gut.", "Où est la bibliothèque ? Près de l'église.",
    "El niño comió piñas mañana.", "Zażółć gęślą jaźń.", "Příliš žluťoučký kůň úpěl.",
    "İstanbul'da ılık bir gün, çay içtik.", "Việt Nam có nhiều cảnh đẹp.",
    "Все люди рождаются свободными и равными.", "Съешь же ещё этих мягких булок.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.", "Բոլոր մարդիկ ծնվում են ազատ։",
    "ყველა ადამიანი იბადება თავისუფალი.", "יולדים כל בני האדם חופשיים.", "שָׁלוֹם עֲלֵיכֶם",
    "يولد جميع الناس أحرارا متساوين.", "سَلَامٌ عَلَيْكُم", "همه انسان‌ها آزاد به دنیا می‌آیند.",
    "ܫܠܡܐ ܥܠܝܟܘܢ", "ހުރިހާ އިންސާނުން", "ߒߞߏ ߞߊ߲", "सभी मनुष्य स्वतंत्र जन्म लेते हैं।",
    "সব মানুষ স্বাধীনভাবে জন্মায়।", "ਸਾਰੇ ਮਨੁੱਖ ਆਜ਼ਾਦ ਹਨ।", "બધા માણસો સ્વતંત્ર છે.",
    "ସବୁ ମଣିଷ ସ୍ୱାଧୀନ।", "எல்லா மனிதரும் சுதந்திரமாக.", "అందరు మనుషులు స్వేచ్ఛగా.",
    "ಎಲ್ಲಾ ಮಾನವರು ಸ್ವತಂತ್ರರು.", "എല്ലാ മനുഷ്യരും സ്വതന്ത്രർ.", "සියලු මිනිසුන් නිදහස්.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ", "ມະນຸດທຸກຄົນເກີດມາ", "འགྲོ་བ་མིའི་རིགས་རྒྱུད།",
    "လူတိုင်းသည် လွတ်လပ်စွာ", "មនុស្សទាំងអស់កើតមក", "ሰው ሁሉ ነጻ ሆኖ ይወለዳል።", "ᎦᏥᏲᎵᎠᏁᎯ ᎨᏎ",
    "ᐃᓄᓕᒫᑦ ᐊᓂᖅᑎᕆᔪᑦ", "ᠬᠦᠮᠦᠨ ᠪᠦᠷ", "모든 인간은 자유롭게 태어났다.", "人人生而自由，在尊严和权利上一律平等。",
    "我们今天去北京大学。", "すべての人間は、生まれながらにして自由である。", "カタカナとひらがな", "ｶﾀｶﾅ ﾊﾝｶｸ ＦＵＬＬ１２３",
    "𐌲𐌿𐍄𐌰 𐌹𐍃𐍄", "𒀀𒈾 𒁀𒀀", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𝒳𝓎", "ꦱꦧꦼꦤ꧀ ꦮꦺꦴꦁ", "ⴰⵎⴰⵣⵉⵖ ⵜⴰⵎⵓⵔⵜ",
]
CODE = [
    "def main(argv):\n    return 0 if argv else 1\n", "for (int i = 0; i < n; i++) {\n\tsum += a[i];\n}",
    "SELECT * FROM t WHERE id = 42 AND name LIKE '%x%';", "<html>\n  <body class=\"a\">&nbsp;</body>\n</html>",
    "{\"key\": [1, 2.5e-3, null, true]}", "x=1;y=22;z=333;w=4444;v=55555", "https://example.org/a?b=c&d=e#f",
    "    indented\n        more\n\n\n\nend", "a->b.c::d(e)[f]{g}<h>", "/* ---- */ // ==== ####",
    "#!/bin/sh\r\necho \"$HOME\"\r\n\r\n", "0x1F 0b101 1_000 3.14159 1,234,567.89 -1e10",
]
SPECIAL_TEXT = ["<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>",
                "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<mask>", "[WORD]", "[Norm]",
                "<|im_", "<0x0A>", "<0xFF>", "▁", "Ġ", "<extra one>"]
MARKS = ["é", "é", "Å", "Å", "ﬁ", "①", "ǆ", "ẛ̣", "q̣̇", "q̣̇", "a\u0301\u0316\u0327\u0323",
         "\u0327\u0301\u0316x", "각", "각", "ﷺ", "ℌ", "½", "²", "Σς", "İ", "ß", "ſ", "'ſ", "'S",
         "K", "\u0344", "\u1e9b\u0323", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!͖̬̰̙̗̿̋ͥͥ̂ͣ̐́́͜͞", "\u0f73\u0f71", "நி", "\u09c7\u09be"]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "☕", "🤷🏿‍♂️", "1️⃣", "🧑‍🚀🚀", "😀😃😄😁😆"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u00a0", "\u3000", "\u2003\u2003", "\u200b",
          "\u180e", "\u2028", "\x85", "\x0b\x0c", "     \t  \n   ", "\ufeff", "\u200d", "\u200f", "\u1680", "\u205f"]
CONTROL = ["\x00", "\x01\x02", "\x7f", "\x1b[31m", "\ufffd", "\U0010ffff", "\ue000", "\ufdd0", "\x08", "\xad",
           "\u2060", "\U000e0041", "\ud7ff", "\ufffe"]
DIGITS = ["7", "42", "123", "1234", "12345678901234567890", "٠١٢٣٤", "१२३", "Ⅷ", "⅓", "１２３", "3.14", "1,000", "𝟘𝟙𝟚"]
BLOCKS = [  # name, first, last
    ("Latin", 0xc0, 0x24f), ("Greek", 0x370, 0x3ff), ("Cyrillic", 0x400, 0x4ff), ("Armenian", 0x530, 0x58f),
    ("Hebrew", 0x590, 0x5ff), ("Arabic", 0x600, 0x6ff), ("Syriac", 0x700, 0x74f), ("Thaana", 0x780, 0x7bf),
    ("NKo", 0x7c0, 0x7ff), ("Devanagari", 0x900, 0x97f), ("Bengali", 0x980, 0x9ff), ("Gurmukhi", 0xa00, 0xa7f),
    ("Gujarati", 0xa80, 0xaff), ("Oriya", 0xb00, 0xb7f), ("Tamil", 0xb80, 0xbff), ("Telugu", 0xc00, 0xc7f),
    ("Kannada", 0xc80, 0xcff), ("Malayalam", 0xd00, 0xd7f), ("Sinhala", 0xd80, 0xdff), ("Thai", 0xe00, 0xe7f),
    ("Lao", 0xe80, 0xeff), ("Tibetan", 0xf00, 0xfff), ("Myanmar", 0x1000, 0x109f), ("Georgian", 0x10a0, 0x10ff),
    ("Jamo", 0x1100, 0x11ff), ("Ethiopic", 0x1200, 0x137f), ("Cherokee", 0x13a0, 0x13ff),
    ("Syllabics", 0x1400, 0x167f), ("Khmer", 0x1780, 0x17ff), ("Mongolian", 0x1800, 0x18af),
    ("Vietnamese", 0x1e00, 0x1eff), ("Kana", 0x3040, 0x30ff), ("Han", 0x4e00, 0x9fff), ("Hangul", 0xac00, 0xd7a3),
    ("Gothic", 0x10330, 0x1034a), ("Symbols", 0x2000, 0x2bff), ("Compat", 0xf900, 0xffef), ("Math", 0x1d400, 0x1d7ff),
]

GPT2 = None  # the pattern built into ByteLevel
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def block_word(rng, first, last):
    codes = [c for c in (rng.randint(first, last) for _ in range(60))
             if unicodedata.category(chr(c))[0] in "LMNPS"]
    return "".join(chr(c) for c in codes[:rng.randint(1, 9)])


def library_agrees_with_unicode(text):
    """The library's tables are of Unicode 9: it leaves marks of later versions in disorder."""
    return all(getattr(normalizers, form)().normalize_str(text) == unicodedata.normalize(form, text)
               for form in ["NFC", "NFD", "NFKC", "NFKD"])


def make_strings():
    rng = random.Random(20240)
    strings = ["", "a", "aa", " a", "a ", " ", "  ", "hello world", " hello  world ", "Hello, World!",
               "a zebrafish", "zebrafish zebrafishes", " quixotic quixotic."]
    strings += SENTENCES + CODE + SPECIAL_TEXT + MARKS + EMOJI + SPACES + CONTROL + DIGITS
    strings += [" " * n + "x" + " " * (n // 2) for n in range(1, 20)]
    strings += ["\n" * n + " " * (20 - n) + "y" for n in range(20)]
    strings += ["a" * 300, "ab" * 150, "😀" * 40, "\u0301" * 50, "\u0316\u0301" * 30, "中" * 100, "0" * 50]
    for token in SPECIAL_TEXT:
        strings += [f"a{token}b", f"a {token} b", f"{token}{token}", f" {token}", f"x \t{token}\n y",
                    f"{token}é", token.upper(), f"_{token}_", f"é{token} 中"]
    for _, first, last in BLOCKS:
        for _ in range(5):
            strings.append(" ".join(block_word(rng, first, last) for _ in range(rng.randint(1, 5))))
    pools = [SENTENCES, CODE, SPECIAL_TEXT, MARKS, EMOJI, SPACES, CONTROL, DIGITS]
    for _ in range(560):
        parts = []
        for _ in range(rng.randint(2, 7)):
            part = rng.choice(rng.choice(pools))
            at = rng.randrange(len(part) + 1)
            parts.append(part[at:at + rng.randint(1, 12)] if rng.random() < 0.6 else part[:24])
            if rng.random() < 0.4:
                parts.append(rng.choice(SPACES))
        strings.append("".join(parts))
    strings = [s for s in dict.fromkeys(strings) if library_agrees_with_unicode(s)]
    assert len(strings) >= 1000, len(strings)
    return strings


def corpus():
    rng = random.Random(7)
    lines = (SENTENCES + CODE) * 6
    lines += ["the and of to in is it that was for on are with they be at one have this " * 2,
              "hello world " * 5, "function return value number string " * 3] * 4
    lines += [" ".join(block_word(rng, f, l) for _ in range(6)) for _, f, l in BLOCKS]
    return lines


def byte_level(size, normalizer, regex, specials, **model):
    tok = Tokenizer(models.BPE(**model))
    if normalizer:
        tok.normalizer = normalizer
    if regex is None:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(corpus(), trainer)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(specials)
    return tok


def make_gpt2():
    tok = byte_level(900, None, GPT2, ["<|endoftext|>"])
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok


def make_llama3():
    tok = byte_level(900, None, LLAMA3, [], ignore_merges=True)
    # Whole words that no merge makes: ignore_merges alone finds them.
    data = json.loads(tok.to_str())
    for word in ["zebrafish", "Ġquixotic", "<|"]:
        data["model"]["vocab"].setdefault(word, len(data["model"]["vocab"]))
    tok = Tokenizer.from_str(json.dumps(data))
    tok.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", "<|im_start|>"])
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[
            ("<|begin_of_text|>", tok.token_to_id("<|begin_of_text|>"))])])
    return tok


def make_qwen2():
    tok = byte_level(900, normalizers.NFC(), QWEN2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tok.add_tokens([AddedToken("<extra one>", special=False, normalized=True),
                    AddedToken("é", special=False, normalized=True)])
    return tok


def sentencepiece_shape(tok, size):
    """Renumbers a trained vocabulary: unknown, BOS, EOS, 256 bytes, then the rest."""
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=160,
                                  special_tokens=["<unk>"])
    tok.train_from_iterator(corpus(), trainer)
    data = json.loads(tok.to_str())
    learnt = [t for t, _ in sorted(data["model"]["vocab"].items(), key=lambda p: p[1]) if t != "<unk>"]
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + learnt
    data["model"].update(vocab={t: i for i, t in enumerate(names)}, byte_fallback=True, fuse_unk=True,
                         unk_token="<unk>")
    data["added_tokens"] = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    return data


LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                 decoders.Strip(" ", 1, 0)]


def make_llama2():
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Training needs words; the tokenizer itself has no pre-tokenizer.
    tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    data = sentencepiece_shape(tok, 700)
    data["pre_tokenizer"] = None
    # The older way to write merges.
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    tok = Tokenizer.from_str(json.dumps(data))
    tok.post_processor = processors.TemplateProcessing(
        "<s> $A", "<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tok.decoder = decoders.Sequence(LLAMA_DECODER)
    text = json.loads(tok.to_str())
    text["model"]["merges"] = data["model"]["merges"]
    return json.dumps(text, ensure_ascii=False)


def make_mistral():
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    data = sentencepiece_shape(tok, 700)
    tok = Tokenizer.from_str(json.dumps(data))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.add_special_tokens(["[INST]", "[/INST]"])
    tok.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tok.decoder = decoders.Sequence(LLAMA_DECODER)
    return tok


def variants():
    """Small tokenizers, one for each other setting: name -> tokenizer."""
    def plain(pre_tokenizer, norm=None, decoder=None, unk=None, fuse=False, train=None):
        tok = Tokenizer(models.BPE(unk_token=unk, fuse_unk=fuse))
        tok.pre_tokenizer = train or pre_tokenizer
        if norm:
            tok.normalizer = norm
        tok.train_from_iterator(SENTENCES + CODE, trainers.BpeTrainer(
            vocab_size=170, limit_alphabet=110, show_progress=False, special_tokens=[unk] if unk else []))
        tok.pre_tokenizer = pre_tokenizer
        if decoder:
            tok.decoder = decoder
        return tok

    pre, norm = pre_tokenizers, normalizers
    words = pre.Split(" ", "isolated")
    out = {}
    for behavior in ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]:
        for invert in [False, True]:
            name = f"split_{behavior}{'_inverted' if invert else ''}"
            out[name] = plain(pre.Sequence([
                pre.Split(Regex(r"\s|[.,;:]"), behavior, invert), pre.Split("a", behavior, invert)]), train=words)
    out["split_empty_match"] = plain(pre.Split(Regex(r"x*|(?=e)"), "merged_with_previous"), train=words)
    out["split_words"] = plain(pre.Split(Regex(r"\w+|\W\d{1,2}+|^\S|\v"), "isolated"), train=words)
    out["split_scripts"] = plain(pre.Split(
        Regex(r"\p{Han}++|[\p{Hiragana}\p{Katakana}\s]+?|\p{^L}{2}|[\u0300-\u036f\S]{,3}x|(?<=a)[[:digit:]]|\{"),
        "contiguous"), train=words)
    out["unk_fused"] = plain(pre.Sequence([pre.Whitespace(), pre.Digits(individual_digits=True)]),
                             norm.Sequence([norm.NFKC(), norm.Lowercase(), norm.Strip()]), unk="<unk>", fuse=True)
    out["unk_single"] = plain(pre.Sequence([pre.WhitespaceSplit(), pre.Punctuation("contiguous"), pre.Digits()]),
                              norm.Sequence([norm.NFD(), norm.Strip(left=True, right=False)]), unk="<unk>")
    out["nfkd_punctuation"] = plain(pre.Punctuation(), norm.Sequence(
        [norm.NFKD(), norm.Replace(Regex(r"\s+"), " "), norm.Replace("--", "—")]),
        decoder=decoders.Sequence([decoders.Replace("e", "E"), decoders.Strip("b", 0, 1), decoders.Strip("a", 1, 0), decoders.Fuse()]))
    out["metaspace_always"] = plain(pre.Metaspace(), decoder=decoders.Metaspace())
    out["metaspace_never"] = plain(pre.Metaspace("_", "never"), decoder=decoders.Metaspace("_", "never"))
    out["byte_level_space"] = plain(pre.ByteLevel(), decoder=decoders.ByteLevel())
    # The library aborts where Strip with a stop meets an empty token, so that one comes first.
    out["fuse_replace"] = plain(pre.Split("e", "isolated"), decoder=decoders.Sequence(
        [decoders.Fuse(), decoders.Strip("!", 0, 1), decoders.Replace("the", "[THE]"), decoders.Strip(" ", 2, 0)]))
    added = plain(pre.WhitespaceSplit(), norm.Lowercase())
    added.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, special=True, normalized=False),
                              AddedToken("</s>", rstrip=True, special=True, normalized=True),
                              AddedToken("<s>", lstrip=True, special=True, normalized=False)])
    added.add_tokens([AddedToken("[WORD]", single_word=True, normalized=False),
                      AddedToken("[Norm]", normalized=True, lstrip=True),
                      AddedToken("quick", single_word=True, normalized=True),
                      AddedToken("<|im", normalized=False), AddedToken("<|im_start|>", normalized=False),
                      AddedToken("▁", single_word=True)])
    out["added"] = added
    return out


def expectation(tok, n, text, with_template):
    tok.encode_special_tokens = False
    ids = tok.encode(text, add_special_tokens=False).ids
    line = {"n": n, "ids": ids}
    if with_template:
        line["bos"] = tok.encode(text, add_special_tokens=True).ids
    skipped = tok.decode(ids) if ids else ""
    everything = tok.decode(ids, skip_special_tokens=False) if ids else ""
    tok.encode_special_tokens = True
    plain = tok.encode(text, add_special_tokens=False).ids
    if plain != ids:
        line["plain"] = plain
    if skipped != text:
        line["text"] = skipped
    if everything != skipped:
        line["all"] = everything
    return line


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
                            for line in lines), encoding="utf-8")


def write(name, tok, strings, step, random_lines):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    text = tok if isinstance(tok, str) else tok.to_str()
    text = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    tok = Tokenizer.from_str(text)
    write_lines(folder / "expected.jsonl",
                [expectation(tok, n, s, n % 40 == 0) for n, s in enumerate(strings)
                 if n % step == 0 or (step > 1 and any(t in s for t in ("<", "[")) and n % 2 == 0)])
    rng = random.Random(name)
    top = max(tok.get_vocab(with_added_tokens=True).values()) + 1
    bytes_only = [tok.token_to_id(f"<0x{b:02X}>") for b in [0x41, 0xe4, 0xbd, 0xa0, 0xf0, 0x9f, 0x98, 0x80, 0xff]]
    lines = []
    for _ in range(random_lines):
        ids = [rng.choice(bytes_only) if bytes_only[0] and rng.random() < 0.5 else rng.randrange(top)
               for _ in range(rng.randint(1, 12))]
        line = {"ids": ids, "text": tok.decode(ids)}
        everything = tok.decode(ids, skip_special_tokens=False)
        if everything != line["text"]:
            line["all"] = everything
        lines.append(line)
    write_lines(folder / "decode.jsonl", lines)


def main():
    assert tokenizers.__version__ == VERSION, f"needs tokenizers {VERSION}"
    strings = make_strings()
    OUT.mkdir(parents=True, exist_ok=True)
    write_lines(OUT / "strings.jsonl", strings)
    for name, make in [("gpt2", make_gpt2), ("llama3", make_llama3), ("qwen2", make_qwen2),
                       ("llama2", make_llama2), ("mistral", make_mistral)]:
        write(name, make(), strings, 1, 300)
    for name, tok in variants().items():
        write(name, tok, strings, 6, 40)
    print(len(strings), "strings")


if __name__ == "__main__":
    main()
