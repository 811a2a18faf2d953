"""The words of a model card; every number comes from report.json.

A section that a report lacks the numbers for is left out, and so is a cell of the older report.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]
NONE = "–"
CHECKPOINTS = (1, 2, 4, 6, 8)  # groups whose estimates are in the table

EMOJI_STYLES = {"noto", "fluent-3d", "fluent-flat", "twemoji"}
EMOJI = """\
{pictures} emoji in four styles, without skin tones, on white; names and subgroups from Unicode's `emoji-test.txt`;
labels are `style/subgroup`.

| style | source | licence |
|---|---|---|
| noto | Noto Color Emoji, Debian `fonts-noto-color-emoji` | SIL Open Font License 1.1 |
| fluent-3d, fluent-flat | Microsoft Fluent, npm `@lobehub/fluent-emoji-3d`, `@lobehub/fluent-emoji-flat` | MIT |
| twemoji | Twemoji, npm `@twemoji/svg` | graphics CC-BY 4.0 |

A fixed tenth of the emoji, chosen by name across all styles ({names} emoji, {held_out} pictures), was held out of every
training. Duplicates under other names (some flags) remain, and the flags of the two Fluent styles are the same
drawings. The weights are released under the MIT licence of dar_fast; attribution for Twemoji: graphics copyright
Twitter, Inc and other contributors, CC-BY 4.0.
"""  # noqa: E501
DEPARTURES: dict[
    str, Callable[[Any], str]
] = {  # recipe fields that the paper has no such values of
    "optimizer": lambda v: "Muon on the hidden matrices" if v == "muon" else "",
    "continuous_steps": lambda v: f"the first {v} steps without quantising" if v else "",
    "revive_after": lambda v: (
        f"codes idle for {v} steps moved onto the data" if v != "none" else ""
    ),
    "rollout": lambda v: f"a loss on the solver's own states, weight {v:g}" if v else "",
    "gate_init": lambda v: f"gates that start at {v:g}" if v else "",
    "lpips_weights": lambda v: "no perceptual loss" if v == "none" else "",
    "repa_weights": lambda v: "no alignment loss" if v == "none" else "",
}


def look_up(report: Report, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    place: Any = report
    for part in path.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def introduction(report: Report) -> str:
    """What the model is, how large, and how long it was trained on what."""
    models = report["models"]
    text = (
        f"A D-AR tokenizer ({models['tokenizer_parameters'] / 1e6:.1f}M parameters) and prior "
        f"({models['prior_parameters'] / 1e6:.1f}M) for pictures of {models['image_size']}×"
        f"{models['image_size']}: {models['num_tokens']} codes of a "
        f"{models['codebook_size']:,}-entry codebook in {models['num_groups']} groups, "
        f"{models['num_steps']} denoising steps, {models['labels']} labels. It is here so that "
        "anyone can see D-AR work in one command without a GPU or a download."
    )
    trained = [run for run in report.get("runs", ()) if run.get("kind") in ("tokenizer", "prior")]
    minutes = [run["minutes"] for run in trained if "minutes" in run]
    if minutes:
        text += f" The runs below took {sum(minutes):.0f} minutes{_on(trained)}."
    return text


def _on(runs: list[Any]) -> str:
    """` on 2 cores of X`, as the calls of `runs` say; nothing where they do not."""
    seen: list[str] = []
    for run in runs:
        for call in run.get("calls", ()):
            cores, ranks = call.get("cores"), call.get("ranks", 1)
            words = str(call["device"])
            if call.get("threads") and "cpu" == call.get("type"):
                threads = f"{call['threads']} thread{'s' * (call['threads'] != 1)}"
                words = f"{threads} on {cores} cores of {words}"
            words = f"{ranks} × {words}" if ranks > 1 else words
            if words not in seen:
                seen.append(words)
    return f" on {'; '.join(seen)}" if seen else ""


def data(report: Report) -> str:
    """Where the pictures come from, and what was held out."""
    pictures = report["pictures"]
    count = pictures["train"] + pictures["held_out"]
    if set(pictures.get("styles", ())) == EMOJI_STYLES:
        return EMOJI.format(
            pictures=f"{count:,}", names=pictures["held_out_names"], held_out=pictures["held_out"]
        )
    return f"{count:,} pictures, {pictures['held_out']:,} of them held out of every training.\n"


def training(report: Report) -> str:
    """Steps, minutes and commands of every run, and what differs from the paper."""
    runs = [run for run in report.get("runs", ()) if "step" in run]
    lines = []
    commands = [call["command"] for run in runs for call in run.get("calls", ())]
    if commands:
        once = list(dict.fromkeys(commands))  # calls that resumed one another
        lines += [f"    {command}" for command in once] + [""]
    for run in runs:
        calls = len(run.get("calls", ()))
        text = f"- {run['kind']}: {run['step']:,} steps, {run['minutes']:.0f} minutes{_on([run])}"
        lines.append(text + (f", in {calls} calls that resumed one another" if calls > 1 else ""))
    versions = look_up(report, "machine.versions")
    if versions:
        lines += ["", "Reported by " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."]
    recipes = [run["recipe"] for run in runs if run["kind"] == "tokenizer" and "recipe" in run]
    if recipes:
        said = (say(recipes[0][key]) for key, say in DEPARTURES.items() if key in recipes[0])
        differs = [text for text in said if text]
        if differs:
            lines += ["", f"Not as published, in the tokenizer: {', '.join(differs)}."]
    return "\n".join(lines) + "\n" if lines else ""


def _decibel(psnr: Any) -> str:
    if psnr is None:
        return NONE
    return f"{psnr['psnr']:.1f} dB ({psnr['psnr_of_mean']:.1f})"


def _share(value: Any) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"


def _nats(value: Any) -> str:
    return NONE if value is None else f"{value:.2f} nats"


def _estimates(report: Report) -> str:
    seen = {p["groups"]: p["psnr"] for p in look_up(report, "tokenizer.previews") or ()}
    return ", ".join(f"{seen[g]:.1f}" for g in CHECKPOINTS if g in seen) + " dB" if seen else NONE


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    codes = look_up(report, "tokenizer.codes_held_out")
    by_style = look_up(report, "tokenizer.psnr_by_style") or {}
    groups = {p["groups"] for p in look_up(report, "tokenizer.previews") or ()}
    prior = report["prior"]
    yield "reconstruction", _decibel(report["tokenizer"])
    if any(by_style):
        scores = ", ".join(f"{score:.1f}" for score in by_style.values())
        yield f"by style: {', '.join(by_style)}", f"{scores} dB"
    shown = ", ".join(str(g) for g in CHECKPOINTS if g in groups)
    yield f"estimate from {shown} groups", _estimates(report)
    yield "the mean training picture", _decibel(look_up(report, "baselines.mean"))
    yield "64 unquantised principal components", _decibel(look_up(report, "baselines.components"))
    yield "codes used by held-out pictures", _share(codes["codes_used"])
    yield "their perplexity", f"{codes['perplexity']:,.0f}"
    yield "prior, cross-entropy a code", _nats(prior["cross_entropy"])
    yield "on training pictures", _nats(prior["cross_entropy_train"])
    yield "unigram cross-entropy", _nats(prior["unigram_cross_entropy"])
    yield "unigram entropy", _nats(prior["unigram_entropy"])


def figures(report: Report, before: Report | None) -> str:
    """The held-out figures, beside those of an older report where there is one."""
    older = dict(_rows(before)) if before is not None else {}
    lines = [
        f"{report['pictures']['held_out']} held-out pictures, PSNR as the mean over pictures (over "
        "the mean squared error in brackets):",
        "",
        "| | now | before |" if before is not None else "| | |",
        "|---|---|---|" if before is not None else "|---|---|",
    ]
    for name, value in _rows(report):
        last = f" {older.get(name, NONE)} |" if before is not None else ""
        lines.append(f"| {name} | {value} |{last}")
    previews = look_up(report, "tokenizer.previews")
    if previews:
        first, best = previews[0], report["tokenizer"]["psnr"]
        lines += [
            "",
            f"The estimate from {first['groups']} group has {first['psnr']:.1f} dB; all groups "
            f"change that by {best - first['psnr']:+.1f} dB.",
        ]
    return "\n".join(lines) + "\n"


def judged(report: Report, before: Report | None) -> str:
    """What a classifier made of real pictures, reconstructions and samples."""
    if "classifier" not in report:
        return ""
    settings, styles = report["settings"], report["pictures"].get("styles", ())
    steps = [run["step"] for run in report.get("runs", ()) if run.get("kind") == "classifier"]
    trained = f", {steps[0]:,} steps of training on the same split," if steps else ""
    lines = [
        f"A small classifier{trained} judged {settings['samples']} samples at guidance "
        f"{settings['guidance']:g}, temperature {settings['temperature']:g}, top-p "
        f"{settings['top_p']:g}:",
        "",
        "| accuracy | style | subgroup | both |",
        "|---|---|---|---|",
    ]
    rows = (
        ("held_out", "real held-out pictures"),
        ("reconstructions", "their reconstructions"),
        ("samples", "samples, for what was asked"),
    )
    parts = ("style", "subgroup", "both")
    older = look_up(before or {}, "classifier") or {}
    same = older.get("held_out") == report["classifier"]["held_out"]
    for key, name in rows:
        cells = [_share(report["classifier"][key][part]) for part in parts]
        if key in older and not (same and key == "held_out"):
            pairs = zip(cells, parts, strict=True)
            cells = [f"{now} (before {_share(older[key][part])})" for now, part in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    real, samples = (report["classifier"][key]["both"] for key in ("held_out", "samples"))
    text = f"The judge itself is right in both for {_share(real)} of real held-out pictures"
    if len(styles) > 1:
        text += f"; chance is {_share(1 / len(styles))} for the style"
    text += f". Samples are at {_share(samples)}."
    if older:
        judge = "the same judge's" if same else "that report's own judge's"
        text += f" The figures before are {judge}."
    return "\n".join([*lines, "", text]) + "\n"
