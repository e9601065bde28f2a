"""The results of a conversion as Markdown tables, samples and one picture."""

import json
import math
import re
from pathlib import Path

HEADING = "## Results"
# One curve of the picture per rule and block size: what these numbers mean is in the sweep.
DRAWN = "threshold"


def write(results: Path, page: Path) -> None:
    """Replaces the section HEADING of the page, or adds it at its end; draws page.png beside it.

    Raises FileNotFoundError where there is no page, ValueError without matplotlib.
    """
    text = page.read_text(encoding="utf-8")
    picture = page.with_suffix(".png")
    section = "\n\n".join([*tables(results), f"![curves]({picture.name})"])
    draw(results, picture)
    part = page.with_name(f"{page.name}.part")
    part.write_text(replaced(text, section), encoding="utf-8")
    part.replace(page)


def replaced(text: str, section: str) -> str:
    """The page with `section` below HEADING, up to the next heading of its level or above."""
    found = re.search(rf"^{HEADING}[ \t]*$", text, re.MULTILINE)
    before, rest = (text, "") if found is None else (text[: found.start()], text[found.end() :])
    following = re.search(r"^##? ", rest, re.MULTILINE)
    after = "" if following is None else rest[following.start() :]
    parts = [before.rstrip(), HEADING, section, after]
    return "\n\n".join(part for part in parts if part).rstrip("\n") + "\n"


def _all(results: Path, kind: str) -> dict[str, dict]:
    """The records of a kind by the names of their runs."""
    return {
        path.stem.partition("-")[2]: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(results.glob(f"{kind}-*.json"))
    }


def _start(results: Path) -> dict:
    return json.loads((results / "start.json").read_text(encoding="utf-8"))


def tables(results: Path) -> list[str]:
    """What was trained, the bounds, the sources, the sweep and samples, as far as there are any."""
    begun, trained = _start(results), _all(results, "train")
    measured, decoded = _all(results, "measure"), _all(results, "decode")
    reference = decoded.pop("start", None)
    found = [_conditions(begun)]
    if trained:
        found.append(_training(trained))
    if measured:
        found += [_bounds(begun, measured), _by_source(begun, measured)]
    if reference is not None:
        trained_at = {name: one["block_size"] for name, one in trained.items()}
        found += [_sweep(reference, decoded, trained_at), *_samples(reference, decoded)]
    return found


def _conditions(begun: dict) -> str:
    ar = begun["ar"]
    return (
        f"{begun['model']} on {begun['device']}, jax {begun['jax']}, {begun['dtype']}. Scored: "
        f"{ar['tokens']} tokens, {ar['bytes']} bytes of {len(ar['sources'])} held-out sources, in "
        f"windows of at most {begun['row_length']} tokens (windows {begun['windows']}). "
        f"As an AR model, before: {ar['bits_per_byte']:.4f} bits/byte."
    )


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _training(trained: dict[str, dict]) -> str:
    head = ["run", "steps", "tokens scored in training", "seconds", "tokens per second", "finished"]
    return _table(
        head,
        [
            [
                name,
                str(one["steps"]),
                f"{one['tokens'] / 1e6:.1f} M",
                f"{one['seconds']:.0f}",
                f"{one['tokens_per_second'] / 1e3:.1f}k",
                "yes" if one["finished"] else "no",
            ]
            for name, one in trained.items()
        ],
    )


def _sizes(measured: dict[str, dict]) -> list[str]:
    return sorted({size for one in measured.values() for size in one["bounds"]}, key=int)


def _bounds(begun: dict, measured: dict[str, dict]) -> str:
    before = begun["ar"]["bits_per_byte"]

    def cell(one: dict | None) -> str:
        if one is None:
            return ""
        error = f" +- {one['se']:.4f}" if one["se"] else ""
        return f"{one['bits_per_byte']:.4f}{error} ({one['bits_per_byte'] / before - 1:+.1%})"

    sizes = _sizes(measured)
    lines = [
        [name, *(cell(one["bounds"].get(size)) for size in sizes), cell(one["ar"])]
        for name, one in measured.items()
    ]
    heads = ["run", *(f"bound, B = {size}" for size in sizes), "clean stream as AR, after"]
    return (
        f"Held-out bits per byte, and how far they are from the AR model's {before:.4f} before:\n\n"
        + _table(heads, lines)
    )


def _by_source(begun: dict, measured: dict[str, dict]) -> str:
    """Of every run the bound at the largest block it was trained with, if it was measured there."""
    shown = {
        name: one["bounds"][str(one["trained"])]
        for name, one in measured.items()
        if str(one["trained"]) in one["bounds"]
    }
    head = ["source", "AR, before", *(f"{n}, B = {one['block_size']}" for n, one in shown.items())]
    lines = [
        [source, f"{bits:.3f}", *(f"{one['sources'][source]:.3f}" for one in shown.values())]
        for source, bits in begun["ar"]["sources"].items()
    ]
    return "By source:\n\n" + _table(head, lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _sweep(reference: dict, decoded: dict[str, dict], trained_at: dict[str, int]) -> str:
    """Every rule at temperature 1, and the greedy thresholds; each run at its own block size.

    The samples below show all block sizes, the picture thresholds at temperature 1 of all of them.
    """

    def shown(name: str, one: dict) -> bool:
        own = one["block_size"] == trained_at.get(name, one["block_size"])
        return own and (one["temperature"] == 1.0 or one["rule"] == DRAWN)

    def line(name: str, size: str, rule: str, temperature: str, one: dict) -> list[str]:
        return [
            name,
            size,
            rule,
            temperature,
            _number(one.get("tokens_per_forward"), 2),
            _number(one["judge_bits_per_byte"], 3),
            _number(one["distinct"], 3),
            _number(one["unigram_entropy_bits"], 2),
            _number(one["mean_tokens"], 0),
        ]

    lines = [line("the text itself", "", "", "", reference["truth"])]
    lines += [
        line("AR", "1", "token by token", f"{one['temperature']:g}", one)
        for one in (reference["ar-1"], reference["ar-0"])
    ]
    lines += [
        line(
            name,
            str(one["block_size"]),
            f"{one['rule']} {one['number']:g}",
            f"{one['temperature']:g}",
            one,
        )
        for name, found in decoded.items()
        for one in found["settings"]
        if shown(name, one)
    ]
    head = ["run", "B", "rule", "temperature", "tokens per forward", "bits/byte by the AR model"]
    head += ["distinct pairs", "entropy of tokens, bits", "tokens written"]
    return (
        f"Continuations of {reference['asked']['prompts']} held-out texts by "
        f"{reference['asked']['tokens']} tokens, judged by the AR model before. Shown is each run "
        "in blocks of its own size, under every rule at temperature 1 and under thresholds alone "
        "at temperature 0; OUT/results/decode-RUN.json has the rest.\n\n" + _table(head, lines)
    )


def _samples(reference: dict, decoded: dict[str, dict]) -> list[str]:
    shown = [
        (f"{name}, B = {one['block_size']}, {one['rule']} {one['number']:g}", one)
        for name, found in decoded.items()
        for one in found["settings"]
        if "texts" in one and one["temperature"] == 1.0
    ]
    found = ["Samples at temperature 1, side by side:"]
    for number, prompt in enumerate(reference["given"]):
        lines = [["prompt", prompt], ["the text itself", reference["truth"]["texts"][number]]]
        lines.append(["AR", reference["ar-1"]["texts"][number]])
        lines += [[name, one["texts"][number]] for name, one in shown]
        found.append(_table(["", "text"], [[name, _cell(text)] for name, text in lines]))
    return found


def _cell(text: str) -> str:
    """A text inside a table: as code, on one line, without what ends a cell."""
    plain = "".join(c if c.isprintable() else " " for c in text.replace("\n", " ↵ "))
    return "`" + plain.replace("|", "¦").replace("`", "'").strip() + "`"


def draw(results: Path, path: Path) -> None:
    """Three panels: bound on the way, bound against the block size, speed against quality.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib; type pip install 'bdjax[plot]'") from error
    begun = _start(results)
    decoded = _all(results, "decode")
    reference = decoded.pop("start", None)
    figure = Figure(figsize=(15, 4.6), facecolor="white")
    FigureCanvasAgg(figure)
    way, bound, speed = figure.subplots(1, 3)
    for name, one in _all(results, "train").items():
        if one["curve"]:
            _, tokens, values = zip(*one["curve"], strict=True)
            way.plot([n / 1e6 for n in tokens], values, marker=".", label=name)
    measured = _all(results, "measure")
    # A mask that was never trained: its bound would flatten all others.
    measured.pop("start", None)
    ticks = [int(size) for size in _sizes(measured)]
    for name, one in measured.items():
        sizes = sorted(one["bounds"], key=int)
        values = [one["bounds"][size]["bits_per_byte"] for size in sizes]
        bound.plot([int(size) for size in sizes], values, marker="o", label=name)
        if one["ar"] is not None:
            after = one["ar"]["bits_per_byte"]
            bound.plot([1], [after], marker="x", color=bound.lines[-1].get_color())
    before = begun["ar"]["bits_per_byte"]
    for axes in (way, bound):
        axes.axhline(before, color="black", linestyle=":", label="AR, before")
        axes.set_ylabel("held-out bits per byte")
    bound.axhline(1.05 * before, color="grey", linestyle="--", linewidth=0.8, label="AR + 5 %")
    way.set_xlabel("training tokens (millions)")
    way.set_title("Bound on the way, at the largest block", fontsize=10)
    bound.set_xlabel("block size (x: clean stream as AR, after)")
    bound.set_xscale("log", base=2)
    bound.set_xticks(ticks, [str(size) for size in ticks])
    bound.set_title("Bound after training", fontsize=10)
    for name, found in decoded.items():
        for size in sorted({one["block_size"] for one in found["settings"]}):
            points = [
                (one["tokens_per_forward"], one["judge_bits_per_byte"] or math.nan)
                for one in found["settings"]
                if (one["block_size"], one["rule"], one["temperature"]) == (size, DRAWN, 1.0)
            ]
            speed.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{name}, B = {size}")
    if reference is not None:
        for label, key, style in (("the text itself", "truth", ":"), ("AR, samples", "ar-1", "--")):
            value = reference[key]["judge_bits_per_byte"]
            speed.axhline(value, color="black", linestyle=style, linewidth=0.9, label=label)
    speed.set_xlabel("tokens per forward (confidence thresholds, temperature 1)")
    speed.set_ylabel("bits per byte by the AR model")
    speed.set_title("Speed against quality", fontsize=10)
    for axes in (way, bound, speed):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, edgecolor="none")
    figure.savefig(path, dpi=140, bbox_inches="tight", pad_inches=0.1)
