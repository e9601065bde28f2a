"""Pictures of a run: its loss, the order in which tokens were committed, a mask.

matplotlib is an extra (`pip install bdjax[plot]`) and is imported when a picture is drawn. Every
function writes the file `path`, of the kind that its suffix names, and raises ImportError, with
the command to type, when matplotlib is missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

INK, PAPER, FAINT = "#22303c", "#ffffff", "#e9edf0"
CLEAN, NOISY = "#2a7f9e", "#e08a3c"


def loss_curve(
    history: Sequence[tuple[int, dict[str, float]]], path: str | Path, name: str = "loss"
) -> None:
    """`name` against the step, as measured and smoothed, from `metrics.Writer.history`.

    Raises ValueError when no step of the history has `name`.
    """
    points = [(step, values[name]) for step, values in history if name in values]
    if not points:
        known = ", ".join(sorted({key for _, values in history for key in values}))
        raise ValueError(f"the history has no {name!r}; it has {known or 'nothing'}")
    steps, values = np.array(points, dtype=np.float64).T
    half = len(values) // 60
    width = 2 * half + 1
    # Edges are padded with themselves, or the average would bend towards zero.
    padded = np.pad(values, half, mode="edge")
    smooth = np.convolve(padded, np.full(width, 1 / width), mode="valid")

    figure = _figure(6.4, 3.6)
    axes = figure.add_subplot()
    axes.plot(steps, values, color=CLEAN, alpha=0.35, linewidth=0.9)
    axes.plot(steps, smooth, color=CLEAN, linewidth=1.9)
    axes.annotate(
        f"{smooth[-1]:.3f}",
        (steps[-1], smooth[-1]),
        (5, 0),
        textcoords="offset points",
        va="center",
        color=CLEAN,
        weight="bold",
    )
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)" if name == "loss" else name, color=INK)
    # The first steps tower over all others: the picture is about where the run ends up.
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), np.quantile(finite, 0.98)) if len(finite) else (0.0, 0.0)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def curves(
    lines: Mapping[str, tuple[Sequence[float | int], Sequence[float | int]]],
    path: str | Path,
    *,
    across: str,
    up: str,
    line: tuple[float, str] | None = None,
) -> None:
    """Named curves (x, y) in one picture, each labelled at its end; `line`: a level and its name.

    Raises ValueError when there is no curve.
    """
    if not lines:
        raise ValueError("no curve to draw; give at least one")
    figure = _figure(7.2, 4.4)
    axes = figure.add_subplot()

    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    ends = []
    for number, (name, (x, y)) in enumerate(lines.items()):
        colour = colours(0.92 * number / max(1, len(lines) - 1))
        axes.plot(x, y, color=colour, linewidth=1.6)
        ends.append((y[-1], x[-1], name, colour))
    values = np.concatenate([np.asarray(y, float) for _, y in lines.values()])
    low, high = values.min(), np.quantile(values, 0.9)
    if line is not None:
        axes.axhline(line[0], color=INK, linewidth=1.0, linestyle=":")
        axes.annotate(
            line[1],
            (0.99, line[0]),
            (0, -11),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
        low = min(low, line[0])
    axes.set_ylim(low - 0.08 * (high - low), high)
    # Labels of neighbouring ends keep a line's distance.
    gap, place = 0.045 * (high - low), -np.inf
    for y, x, name, colour in sorted(ends):
        if y > high:
            # It has left the picture: it is named where it begins, with its lowest value.
            across_x, up_y = lines[name]
            axes.set_xlim(left=across_x[0] - 0.3 * (x - across_x[0]))
            axes.annotate(
                f"{name}  {min(up_y):.3f}",
                (across_x[0], up_y[0]),
                (-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colour,
            )
            continue
        place = max(y, place + gap)
        text = f"{name}  {y:.3f}"
        axes.annotate(
            text, (x, place), (6, 0), textcoords="offset points", va="center", color=colour
        )
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def commit_order(
    tokens_text: Sequence[str],
    commit_step: Int[np.ndarray, "T"],
    block_size: int,
    prompt_length: int,
    path: str | Path,
) -> None:
    """One cell per token, one row per block (or several blocks of a short size).

    Colour is the step at which the token was committed, counted inside its block, from dark (first)
    to light (last); tokens of the prompt are grey. `commit_step` may count from anywhere.
    Raises ValueError when the texts and steps differ in number, or for a block below 1.
    """
    total = len(tokens_text)
    if total != len(commit_step) or not total:
        raise ValueError(
            f"{total} texts and {len(commit_step)} commit steps; expected as many, at least 1"
        )
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    texts = [_shown(text) for text in tokens_text]
    wide = max(1.0, 0.45 * max(map(len, texts)))
    blocks_in_row = max(1, min(int(32 / wide) // block_size, -(-total // block_size)))
    columns = block_size * blocks_in_row
    rows = -(-total // columns)
    rank = _rank_in_block(commit_step, block_size, prompt_length)
    last = max(1, int(rank.max()))

    from_left, from_top = np.arange(total) % columns, np.arange(total) // columns
    gap = 0.35
    x = wide * from_left + gap * (from_left // block_size)
    y = from_top * 1.25
    right = max(wide * columns + gap * (blocks_in_row - 1), 12.0)
    cell = 0.34
    figure = _figure(cell * (right + 0.8), cell * (rows * 1.25 + 1.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.4, right + 0.4)
    axes.set_ylim(rows * 1.25 + 1.5, -0.4)
    axes.set_aspect("equal")
    axes.axis("off")

    import matplotlib
    from matplotlib.patches import Rectangle

    colours = matplotlib.colormaps["viridis"]
    for i, text in enumerate(texts):
        prompt = i < prompt_length
        face = "#dde2e6" if prompt else colours(0.08 + 0.84 * rank[i] / last)
        dark = not prompt and rank[i] / last < 0.62
        corner = (x[i] + 0.04, y[i] + 0.04)
        axes.add_patch(Rectangle(corner, wide - 0.08, 0.92, facecolor=face, lw=0))
        axes.text(
            x[i] + wide / 2,
            y[i] + 0.52,
            text,
            ha="center",
            va="center",
            family="monospace",
            fontsize=11 if wide == 1 else 9.5,
            color=PAPER if dark else INK,
            parse_math=False,
        )
    _legend(axes, colours, rows * 1.25 + 0.55, last, prompt_length > 0)
    _save(figure, path)


def _rank_in_block(
    commit_step: Int[np.ndarray, "T"], block_size: int, prompt_length: int
) -> Int[np.ndarray, "T"]:
    """0 for the tokens of a block's first step, 1 for the next distinct step, and so on."""
    rank = np.zeros(len(commit_step), dtype=np.int64)
    for start in range(0, len(commit_step), block_size):
        block = np.arange(max(start, prompt_length), min(start + block_size, len(commit_step)))
        if len(block):
            rank[block] = np.unique(commit_step[block], return_inverse=True)[1]
    return rank


def _shown(text: str) -> str:
    """What a cell prints: spaces and newlines as signs, control characters as a dot."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    shown = "".join(signs.get(c, c if c.isprintable() else "·") for c in text)
    return shown if len(shown) <= 6 else shown[:5] + "…"


def _legend(axes, colours, y: float, last: int, with_prompt: bool) -> None:
    from matplotlib.patches import Rectangle

    x = 0.04
    if with_prompt:
        axes.add_patch(Rectangle((x, y), 0.92, 0.6, facecolor="#dde2e6", lw=0))
        axes.text(x + 1.15, y + 0.32, "prompt", va="center", fontsize=8, color=INK)
        x += 3.6
    axes.text(x + 1.35, y + 0.32, "step 1", ha="right", va="center", fontsize=8, color=INK)
    x += 1.6
    shades = min(last + 1, 12)
    for i in range(shades):
        face = colours(0.08 + 0.84 * i / max(1, shades - 1))
        axes.add_patch(Rectangle((x + 0.5 * i, y), 0.5, 0.6, facecolor=face, lw=0))
    axes.text(x + 0.5 * shades + 0.25, y + 0.32, f"{last + 1}", va="center", fontsize=8, color=INK)


def mask_picture(
    dense: Bool[np.ndarray, "T S"],
    query_roles: Sequence[str],
    key_roles: Sequence[str],
    path: str | Path,
) -> None:
    """Which key (column) every query (row) sees.

    A role names the stream of a position, "clean", "noisy 1", "padding", ...: runs of one role are
    one region, labelled and framed. Visible pairs are coloured by the key's role: clean, or any
    other. Raises ValueError when the roles and the mask differ in size.
    """
    rows, columns = dense.shape
    if (len(query_roles), len(key_roles)) != (rows, columns):
        raise ValueError(
            f"{len(query_roles)} query and {len(key_roles)} key roles for a mask of "
            f"{rows} x {columns}; expected one role per row and per column"
        )
    clean_key = np.array([role == "clean" for role in key_roles])
    value = np.where(dense, np.where(clean_key, 1, 2), 0)

    cell = min(0.3, 6.0 / max(rows, columns))
    width, height = cell * columns, cell * rows
    left, top, rest = 0.9, 0.5, 0.6
    figure = _figure(left + width + 0.2, top + height + rest)
    whole = figure.get_size_inches()
    axes = figure.add_axes((left / whole[0], rest / whole[1], width / whole[0], height / whole[1]))

    from matplotlib.colors import ListedColormap

    palette = ListedColormap([FAINT, CLEAN, NOISY])
    axes.imshow(value, cmap=palette, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    if cell >= 0.08:
        axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color=PAPER, lw=0.7)
        axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color=PAPER, lw=0.7)
    for spine in axes.spines.values():
        spine.set_visible(False)

    def colour(role: str) -> str:
        return CLEAN if role == "clean" else NOISY

    label = {"fontsize": 9, "weight": "bold"}
    for role, start, stop in _runs(key_roles):
        axes.text(
            (start + stop - 1) / 2,
            -0.5 - 0.1 / cell,
            role,
            ha="center",
            va="bottom",
            color=colour(role),
            **label,
        )
        if start:
            axes.axvline(start - 0.5, color=INK, lw=1.2)
    for role, start, stop in _runs(query_roles):
        axes.text(
            -0.5 - 0.1 / cell,
            (start + stop - 1) / 2,
            role,
            ha="right",
            va="center",
            color=colour(role),
            **label,
        )
        if start:
            axes.axhline(start - 0.5, color=INK, lw=1.2)
    x, below = -0.5, rows - 0.5 + 0.3 / cell
    for text, face in (("sees clean", CLEAN), ("sees noisy", NOISY), ("hidden", "#aab4bc")):
        axes.text(x, below, f"■ {text}", va="center", color=face, fontsize=8)
        x += 0.95 / cell
    _save(figure, path)


def _runs(roles: Sequence[str]) -> list[tuple[str, int, int]]:
    """(role, start, stop) of the runs of equal roles."""
    starts = [i for i, role in enumerate(roles) if i == 0 or role != roles[i - 1]]
    stops = [*starts[1:], len(roles)]
    return [(roles[start], start, stop) for start, stop in zip(starts, stops, strict=True)]


def _figure(width: float, height: float):
    """An empty white figure in inches that needs no display and no pyplot state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; type pip install bdjax[plot]") from error
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.12)
