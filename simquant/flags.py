"""Every flag once: its default, its help, its type, and whether it decides a run. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from simquant import evidence_flags, parsing, processes
from simquant.evidence_flags import EvidenceFlags
from simquant.methods import METHODS
from simquant.parsing import count, flag, fraction, on_output, on_text, picture
from simquant.plans import BASELINE, PROJECTIONS, Pair, Plan, Width
from simquant.tables import USUAL

listed = partial(flag, nargs="*", action=parsing.Projections, metavar="NAME")
device = partial(parsing.matching, pattern=r"auto|cpu|cuda(:[0-9]{1,2})?", words="auto, cpu, cuda or cuda:N")
report_file = partial(parsing.matching, pattern=r"(?i).*\.(json|csv)", words="a file that ends in .json or .csv")
DTYPES = ("auto", "float16", "bfloat16", "float32")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class ModelFlags:
    """model"""

    model: str
    dtype: str = flag(
        "auto", "auto: the checkpoint's own on a GPU, or if its weights are quantized; else float32", DTYPES
    )
    device: str = flag(
        "auto", "auto: the first GPU, or all for a larger model; cuda, cuda:1, cpu", device, decides=False
    )
    revision: str | None = flag(None, "branch, tag or commit of a hub model; ID@REVISION says the same", metavar="REV")
    attn_implementation: str = flag(
        "auto", "auto: flash_attention_2 if installed, else the model's own choice", ATTENTIONS
    )
    compile: str = on_text(
        "auto", "compile the decoder layers; auto: on a GPU whose compiler works", ("auto", "on", "off")
    )


@dataclass(frozen=True)
class QuantizationFlags:
    """quantization"""

    abits: tuple[Width, ...] = flag(
        (Width(4, 4),),
        "bits an entry: 2 to 8, 16 for no quantization, 4/2 for keys/values; a comma list measures all; "
        "transform coding (--klt) takes fractions too, from 0.01 on",
        parsing.width_list, metavar="BITS",
    )  # fmt: skip
    kv_format: tuple[Pair, ...] = flag(
        (Pair("uniform", "uniform"),),
        f"comma list of methods by their names in the README, K/V pairs such as q8_0/q4_0 or 16/q4_0, "
        f"{', '.join(parsing.FAMILIES)}, all; several are compared with the unquantized model",
        parsing.format_list, metavar="LIST",
    )  # fmt: skip
    nf: bool = flag(False, "short for --kv_format nf: NormalFloat levels instead of uniform ones")
    perchannel: tuple[str, ...] = listed(("k_proj",), "which of k_proj and v_proj have one scale per channel")
    pertoken: tuple[str, ...] = listed(("v_proj",), "which of k_proj and v_proj have one scale per token")
    include_sparse: bool = flag(False, "keep outliers exact (dense-and-sparse)")
    sparsity_threshold: float = flag(0.99, "with --include_sparse, the share that is quantized", fraction, metavar="P")
    first_few_fp16: int = flag(
        -1, "leading tokens of every window kept exact (attention sinks); -1: none", count(least=-1), metavar="N"
    )
    recent: int | None = on_text(
        None, "latest tokens that a query sees exact (residual window); none: as the method has it",
        count(least=0), metavar="N",
    )  # fmt: skip
    skip_layers: tuple[int, ...] = flag(
        (), "layers that stay unquantized; -1 is the last", parsing.layer_list, metavar="LIST"
    )
    baseline: bool = on_output(False, "as if 16 stood in --abits: compare with the unquantized model", decides=True)
    saturation: bool = on_text(False, "count the share of entries that fp8 casts clip")
    attribution: bool = on_output(
        False, "with one width, also quantize keys only, values only, and one layer at a time", decides=True
    )


@dataclass(frozen=True)
class TextFlags:
    """text"""

    datasets: tuple[str, ...] = on_text(
        ("wikitext2",), "comma list of wikitext2, c4, c4=FILE, .txt, .json, .jsonl and .parquet files, folders of them",
        parsing.dataset_list, metavar="LIST",
    )  # fmt: skip
    text_column: str = flag("text", "which field of .json, .jsonl and .parquet files is the text", metavar="NAME")
    bos: str = flag(
        "auto", "BOS at the start of the text alone, or of every window; auto: as the model needs it",
        ("auto", "text", "window"),
    )  # fmt: skip
    seqlen: int = flag(2048, "tokens a window", count(least=2), metavar="N")
    limit: int = on_text(512, "at most this many windows of each text", count(least=1), metavar="N")
    batch_size: int | str = on_text(
        1, "windows a forward pass; auto: as many as fit on the GPU", count(least=1, instead="auto"), metavar="N"
    )


@dataclass(frozen=True)
class OutputFlags:
    """output"""

    output: str | None = on_output(
        None, "write settings and results as .json, or the table as .csv", report_file, metavar="FILE"
    )
    resume: bool = on_output(False, "go on with the interrupted run whose JSON --output names")
    overwrite: bool = flag(False, "replace what an output file holds, even figures of an unfinished run", decides=False)
    sort: str | None = on_output(
        None, "order of the rows, bits or delta_ppl; none: by bits if formats are compared, else as given",
        ("bits", "delta_ppl"),
    )  # fmt: skip
    columns: tuple[str, ...] = on_output(
        USUAL, "comma list of figures to print; all of them are in --output", parsing.column_list, metavar="LIST"
    )
    report_context: int = on_output(
        131072, "tokens of the cache whose size is reported", count(least=1), decides=True, metavar="N"
    )
    plot: str | None = on_output(None, "draw the sweep or the attribution as .png or .svg", picture, metavar="FILE")
    plot_activations: str | None = on_output(
        None, "draw a layer's keys and values before and after quantization", picture, metavar="FILE"
    )
    plot_layer: int | None = on_output(
        None, "layer of --plot_activations; else the middle one", count(least=0), metavar="N"
    )
    quiet: bool = flag(False, "no progress bar, even on a terminal", decides=False)
    dry_run: bool = flag(False, "print sites, settings, windows and sizes, and stop; load no weights", decides=False)


@dataclass(frozen=True)
class Flags(OutputFlags, EvidenceFlags, TextFlags, QuantizationFlags, ModelFlags):
    """The flags of the data-free script."""

    groups: ClassVar[tuple[type, ...]] = (ModelFlags, QuantizationFlags, TextFlags, EvidenceFlags, OutputFlags)

    def refusals(self, given: Mapping[str, Any]) -> dict[str, bool]:
        """Return {what is said of flags that do not go together: whether they do not}; given is the command line."""
        both, quantizes = sorted({*self.perchannel} & {*self.pertoken}), self.quantizes()
        fitted = [name for name in self.methods() if METHODS[name].calibrated]
        odd, where = self.odd_widths(), "" if type(self) is not Flags else " of kvquant_llama3_simquant.py"
        return {
            f"{' '.join(both)} in both --perchannel and --pertoken: give it one scale": bool(both),
            "--perchannel and --pertoken are both empty: name k_proj or v_proj, or give --abits 16 to quantize nothing":
                not quantizes and any(width != BASELINE for _, width in self.plan().cells()),
            f"--first_few_fp16 {self.first_few_fp16} covers the whole window of --seqlen {self.seqlen}":
                self.first_few_fp16 >= self.seqlen,
            f"--recent {self.recent} covers the whole window of --seqlen {self.seqlen}: nothing would be quantized":
                (self.recent or 0) >= self.seqlen,
            "--attribution takes one row apart: give one format and one width below 16, and something to quantize":
                self.attribution and (len(self.plan().cells()) != 1 or not quantizes),
            "--resume goes on with the JSON that --output names: give that, not ending in .csv":
                self.resume and (self.output is None or self.output.lower().endswith(".csv")),
            "--plot_layer chooses what --plot_activations draws: give that too":
                self.plot_layer is not None and self.plot_activations is None,
            "--plot draws a sweep or an attribution: give a width below 16":
                self.plot is not None and not quantizes,
            "--plot_activations shows quantization: give a width below 16":
                self.plot_activations is not None and not quantizes,
            f"--abits {', '.join(odd)}: {', '.join(self.methods())} takes 2 to 8 bits, --klt{where} fractions too":
                bool(odd),
            f"--kv_format {', '.join(fitted)} is fitted to data: use kvquant_llama3_simquant.py":
                bool(fitted) and type(self) is Flags,
            "--attn_implementation flash_attention_2 shows a query no residual window: give sdpa":
                self.attn_implementation == "flash_attention_2" and self.has_window(),
            f"--device {self.device} is one GPU, and there are {processes.count()} processes: give cuda":
                ":" in self.device and processes.count() > 1,
        } | evidence_flags.refusals(self, given)  # fmt: skip

    def odd_widths(self) -> list[str]:
        """Return the widths that are fractions or below 2, where a method of whole bits would have to take them."""
        taking = [pair for pair in self.kv_format if not pair.is_fixed]
        if all(METHODS[name].shares_bits for pair in taking for name in pair.methods):
            return []
        return [str(width.label) for width in self.abits if not width.is_whole]

    def quantizes(self) -> bool:
        """Return whether any format, any width and any projection is left to quantize."""
        return bool(self.perchannel or self.pertoken) and any(width != BASELINE for _, width in self.plan().cells())

    def methods(self) -> list[str]:
        """Return the names of all methods, each once."""
        return list(dict.fromkeys(name for pair in self.kv_format for name in pair.methods))

    def has_window(self) -> bool:
        """Return whether any row may have a residual window."""
        parts = [METHODS[name].format(part) for name in self.methods() for part in ("keys", "values")]
        return any(each.options.get("recent") for each in parts) if self.recent is None else self.recent > 0

    def plan(self) -> Plan:
        """Return what is to be quantized, and how. Formats are compared with the unquantized model, widths if asked."""
        axes = dict.fromkeys(self.perchannel, "channel") | dict.fromkeys(self.pertoken, "token")
        parts = {part: axes[name] for name, part in PROJECTIONS.items() if name in axes}
        compares = len(self.kv_format) > 1 or any(pair.is_fixed for pair in self.kv_format)
        is_paired = self.baseline or self.attribution or compares
        widths = tuple(dict.fromkeys([BASELINE, *self.abits] if is_paired else self.abits))
        return Plan(self.kv_format, widths, parts, self.options(), self.skip_layers, self.attribution)

    def options(self) -> dict[str, tuple[str, Any]]:
        """Return {flag: (field of a quantizer, value)} of what is asked beyond a method's own choices."""
        asked: dict[str, tuple[str, Any]] = {}
        if self.first_few_fp16 > 0:
            asked["--first_few_fp16"] = "sinks", self.first_few_fp16
        if self.include_sparse:
            asked["--include_sparse"] = "outliers", 1 - self.sparsity_threshold
        if self.recent is not None:
            asked["--recent"] = "recent", self.recent
        if self.saturation:
            asked["--saturation"] = "counts_clipped", True
        return asked

    def vain(self, given: Mapping[str, Any]) -> list[str]:
        """Return what is said of flags that the command line gives without effect."""
        is_vain = "sparsity_threshold" in given and not self.include_sparse
        found = ["--sparsity_threshold has no effect without --include_sparse"] * is_vain
        is_vain = any(width != BASELINE for width in given.get("abits", ())) and all(p.is_fixed for p in self.kv_format)
        found += evidence_flags.vain(self)
        return found + [f"--abits has no effect on {', '.join(self.methods())}, whose bits are fixed"] * is_vain
