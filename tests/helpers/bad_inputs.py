"""Bad inputs to every verb of the command line, by kind, and the files they name; ``{...}`` is a place of ``places``."""

import json
import shutil

from tiny_models import letters, llama

PAIR = {"prompt": "ab", "completion": "cd"}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

SPECS = [
    "sftt", "sft@", "sft@none", "@", "sft(", "sft)", "sft()()", "sft(1)", "sft(x=1)", "sft(**{'a': 1})", "(", ")", " ",
    "kd(temperature=)", "kd(temperature=0)", "kd(temperature=-1)", "kd(temperature=nan)", "kd(temperature=1e999)",
    "kd(temperature=-1e999)", "kd(temperature=True)", "kd(temperature=None)", "kd(temperature='1')", "kd(temperature=[1])",
    "kd(temperature=1j)", "kd(temperature=2, temperature=3)", "kd(temperature={[]: 1})", "kd(temperature=f())",
    "kd(temperature=9**9**9)", f"kd(temperature={'1' * 400})", f"kd(temperature={'9' * 5000})", f"kd(temperature={'-' * 3000}1)",
    f"kd(temperature={'(' * 300}1{')' * 300})", "kd(temperature=1\0)", f"topk_kd(k={'1' * 30})", "topk_kd(k=0)", "topk_kd(k=1.5)",
    "topk_kd(tail='none')", "iw_sft(clamp=5)", "iw_sft(clamp=(1,))", "iw_sft(clamp=(2.0, 1.0))", "x" * 20_000, "no.py:f", "no.py",
    ".py:f", "no.py:", f"{'x' * 300}.py:f", "\ud800", "one\0two.py:f", "folder:f", "folder.py:f",
]  # fmt: skip

LOSSES = {
    "exits": "import sys\nsys.exit(0)\n",
    "exits_called": "import sys\ndef f(logits, labels):\n    sys.exit(0)\n",
    "raises": "1 / 0\n",
    "recurses": "def f():\n    return f()\nf()\n",
    "syntax": "def f(:\n",
    "binary": b"\xff\xfe\x00",
    "nul": "def f(logits, labels): return 0\0\n",
    "annotated": "def f(logits, labels, *, x: '1/0' = 1.0):\n    return (logits ** 2).sum()\n",
    "no_function": "f = 3\n",
    "nothing": "",
    "text": "def f(logits, labels):\n    return 'loss'\n",
    "parameters": "def f():\n    return 0\n",
}
"""Text of the users' files NAME.py whose ``f`` is asked for."""

DATA = {
    "empty": "", "blank": "\n\n", "list": "[]", "null": "null", "number": "1", "cut": '{"text": "a', "two": '{"text": "a"} {}',
    "utf16": '{"text": "a"}'.encode("utf-16"), "bytes": b"\xff", "nul": '{"text": "a"}\0', "deep": "[" * 100_000,
    "digits": '{"text": ' + "1" * 5000 + "}", "surrogate": '{"text": "\\ud800"}', "no_text": '{"text": null}',
    "turn": '{"messages": [{"role": "assistant", "content": "\\udfff"}]}', "turns": '{"messages": "hi"}',
    "role": '{"messages": [{"role": ["user"], "content": "a"}]}', "unlearned": '{"messages": [{"role": "user", "content": "a"}]}',
    "kinds": '{"prompt": "b", "completion": "c", "question": "b", "answer": "c"}', "no_kind": '{"prompt": "a", "answer": "c"}',
    "same": '{"prompt": "a", "chosen": "b", "rejected": "b"}',
    "parts": '{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}',
    "weight": '{"text": "ab", "weight": "x"}', "nan": '{"text": "ab", "weight": NaN}', "inf": '{"text": "ab", "weight": 1e999}',
    "mask": '{"text": "ab", "critical": 0.5}', "pair": '{"text": "ab", "pair": 1.5}',
    "per_token": '{"text": "ab", "weight": [1]}',
    "column": '{"text": "ab", "weight": 1}\n{"text": "ab"}', "mixed": '{"text": "ab"}\n{"prompt": "a", "completion": "b"}',
}  # fmt: skip
"""Contents of the data files NAME.jsonl."""

CONFIGS = {
    "layers": {"num_hidden_layers": 100_000}, "no_layers": {"num_hidden_layers": 0}, "vocabulary": {"vocab_size": 10**9},
    "width": {"hidden_size": 10**9}, "inner": {"intermediate_size": 10**9}, "heads": {"num_attention_heads": 10**9},
    "odd_heads": {"num_attention_heads": 3}, "other_vocabulary": {"vocab_size": 40}, "text": {"vocab_size": "many"},
    "context": {"max_position_embeddings": -5}, "type": {"model_type": "none"}, "activation": {"hidden_act": "none"},
}  # fmt: skip
"""Changes to config.json of models NAME."""

FILES = {
    "config_list": ("config.json", b"[]"), "config_null": ("config.json", b"null"), "config_cut": ("config.json", 40),
    "weights_cut": ("model.safetensors", -100), "weights_none": ("model.safetensors", b""),
    "weights_header": ("model.safetensors", b"\xff" * 64), "tokenizer_cut": ("tokenizer.json", 100),
    "tokenizer_null": ("tokenizer.json", b"null"), "settings_list": ("tokenizer_config.json", b"[]"),
}  # fmt: skip
"""A file of models NAME: its new content, or where it is cut off."""

TEMPLATES = {
    "divides": "{{ 1 / 0 }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loops": LOOP,
    "power": "{{ 9**9**9 }}",
    "writes": "{{ 'a' * 100000000 }}",
    "memory": "{{ 'a' * 10000000000000000 }}",
    "syntax": "{{ ",
    "unknown": "{{ a.b.c }}",
    "unsafe": "{{ ''.__class__.__mro__ }}",
    "refuses": "{{ raise_exception('no') }}",
}
"""Chat templates of models chat_NAME."""

RUNS = {
    "run_list": "[]",
    "run_null": "null",
    "run_cut": '{"versions": {"py',
    "run_text": '"x"',
    "run_other": "{}",
    "run_bytes": b"\xff",
}
"""config.json of run folders."""


def places(folder):
    """Write all files of the inputs; the names that inputs stand for."""
    llama().save_pretrained(folder / "model")
    letters().save_pretrained(folder / "model")
    rows = [{"question": f"what is {a}{b}", "answer": f"{b}{a}"} for a in "abcd" for b in "efgh"]
    (folder / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "good.py").write_text("def f(logits, labels):\n    return (logits ** 2).sum()\n")
    (folder / "folder.py").mkdir()
    (folder / "empty").mkdir()
    (folder / "strange").mkdir()
    (folder / "strange" / "thesis.txt").write_text("precious")
    (folder / "config_folder" / "config.json").mkdir(parents=True)
    for name, text in LOSSES.items():
        _write(folder / f"{name}.py", text)
    for name, text in DATA.items():
        _write(folder / f"{name}.jsonl", text)
    for name, text in RUNS.items():
        (folder / name).mkdir()
        _write(folder / name / "config.json", text)
    for name, change in CONFIGS.items():
        config = json.loads(_copy(folder, name, "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | change))
    for name, (file, content) in FILES.items():
        path = _copy(folder, name, file)
        _write(path, content if isinstance(content, bytes) else path.read_bytes()[:content])
    for name, template in TEMPLATES.items():
        _copy(folder, f"chat_{name}", "chat_template.jinja").write_text(template)
    _copy(folder, "pickled", "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    llama(vocab=40).save_pretrained(folder / "stranger")
    letters(order=["<s>", "</s>", "|", *"zyxwvutsrqponmlkjihgfedcba\n :é"]).save_pretrained(folder / "stranger")


def _copy(folder, name, file):
    shutil.copytree(folder / "model", folder / name)
    return folder / name / file


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


ON = "--model model --data good.jsonl"
LONG = "x" * 300


def commands():
    """Command lines by kind; a list of words each."""
    verbs = (["show"], ["explain"], ["check"], ["compare", "--variants"], ["view", *ON.split(), "--variants"])
    kinds = {"spec": [[*verbs[at % len(verbs)], spec] for at, spec in enumerate(SPECS)]}
    kinds["loss"] = [[*verb, f"{name}.py:f"] for name in LOSSES for verb in verbs[1 : 3 if name == "text" else 4]]
    kinds["data"] = [["compare", "--model", "model", "--variants", "sft", "--data", f"{name}.jsonl"] for name in DATA]
    kinds["data"] += [
        ["view", "--model", "model", "--data", name]
        for name in ("", "no.jsonl", "folder.py", LONG, "~no_such_user/x", "/dev/zero")
    ]
    models = [
        *CONFIGS,
        *FILES,
        *(f"chat_{name}" for name in TEMPLATES),
        "pickled",
        "empty",
        "no",
        "./no",
        "a/b/c",
        "",
        LONG,
        "good.py",
    ]
    readers = (["explain", "dft"], ["view"], ["compare", "--variants", "sft"], ["list", "--distances"])
    kinds["model"] = [[*readers[at % 4], "--model", name, "--data", "good.jsonl"] for at, name in enumerate(models)]
    kinds["other model"] = [
        [*reader, *ON.split(), option, name]
        for reader, option, name in [
            (["explain", "kd"], "--teacher", "stranger"), (["view"], "--teacher", "stranger"),
            (["compare", "--variants", "kd"], "--teacher", "stranger"), (["explain", "sft_kl"], "--reference", "stranger"),
            (["view"], "--reference", "no"), (["compare"], "--teacher", "empty"), (["list", "--distances"], "--teacher", "no"),
        ]
    ]  # fmt: skip
    kinds["device"] = [
        [*readers[at % 3], *ON.split(), option, value]
        for at, (option, value) in enumerate(
            [("--device", each) for each in ("meta", "cuda:99", "none", "", "cpu:x", "vulkan")]
            + [("--dtype", each) for each in ("int8", "none", "", "complex64", "float8_e4m3fn", "Tensor")]
        )
    ]
    kinds["together"] = [
        line.split()
        for line in (
            "explain dft --model model", "explain dft --data good.jsonl", "explain dft --rows 3", "explain dft --device cpu",
            "explain dft --dtype float32", "explain dft --teacher model", "list --data good.jsonl", "list --figure a.png",
            "list --rows 3", "compare --model model", "compare --data good.jsonl", "compare --teacher model",
            "compare --device cpu",
            "compare --dtype float32", "view", "view --model model", "view --text ab", f"view {ON} --text ab",
            "view --data good.jsonl",
            f"view {ON} --variants kd", f"compare {ON}", "explain kd --model model --data good.jsonl", f"compare {ON} --lr-grid",
            "show sft --bibtex", f"view {ON} --variants cft",
        )
    ]  # fmt: skip
    kinds["number"] = [
        ["compare", f"--{option}", value]
        for option, values in {
            "seeds": ("0", "-1", "x", "1.5", "", "nan", "99999999999", "1" * 400),
            "steps": ("0", "-1", "x", "99999999999", "1e3"),
            "jobs": ("0", "-3", "x"),
            "learning-rate": ("0", "-1", "nan", "inf", "1e999", "x", ""),
        }.items()
        for value in values
    ] + [
        ["view", *ON.split(), f"--{option}", value]
        for option in ("rows", "top", "candidates")
        for value in ("0", "-1", "x", "")
    ]
    kinds["list"] = [
        ["compare", option, value]
        for option, values in {
            "--variants": (
                "",
                ",",
                ",,",
                "sft,",
                ",sft",
                "sft,,dft",
                "sft,sft",
                "sft,sft()",
                "a" * 20_000,
                "sft, ,dft",
            ),
            "--settings": (
                "",
                ",",
                "strong",
                "strong-prior,strong-prior",
                "all,strong-prior",
                "all,",
                "strong-prior\0",
            ),
        }.items()
        for value in values
    ] + [["view", *ON.split(), "--variants", value] for value in ("", ",", "sft,sft", "sft,,dft", "cft", "kd")]
    outs = (
        "",
        " ",
        LONG,
        f"{LONG}/run",
        "good.py",
        "good.py/run",
        "/dev/null",
        "/dev/null/run",
        "/proc/run",
        "~no_such_user/run",
        "strange",
    )
    kinds["out"] = [["compare", "--variants", "sft", "--out", out] for out in (*outs, "a\0b", "config_folder", *RUNS)]
    files = ("", LONG, "folder.py", "no/a", "good.py/a", "/dev/full", "~no_such_user/a", "a\0b")
    kinds["file"] = [["view", *ON.split(), "--out", f"{file}.html" if "/a" in file else file] for file in files]
    kinds["file"] += [
        ["explain", "dft", "--figure", file] for file in (*files, "a.xyz", "a", "no/a.png", f"{'x' * 240}.png", ".png/")
    ]
    kinds["file"] += [["list", "--distances", "--figure", file] for file in ("", "a.xyz", "no/a.png")]
    kinds["usage"] = [
        line.split()
        for line in (
            "frobnicate", "--frobnicate", "show", "explain", "check", "show sft dft", "check sft --model x", "explain dft --frob",
            "list x", "compare sft", "view sft", "compare --seeds", "show --json",
            "explain --latex", "check -x", "list --distances=3",
        )
    ]  # fmt: skip
    return kinds
