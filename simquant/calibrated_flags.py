"""The flags of the calibrated script: what a calibration fits, and to which text. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from simquant import parsing
from simquant.flags import Flags, QuantizationFlags
from simquant.methods import METHODS, Method
from simquant.parsing import count, flag, flag_fields, fraction, picture, plain_settings
from simquant.plans import BASELINE, Plan


@dataclass(frozen=True)
class CalibrationFlags:
    """calibration"""

    calibrate: bool = flag(False, "fit quantizers and save them; without it, evaluate saved ones", decides=False)
    quantizer_path: str | None = flag(
        None, "the quantizer file, ours or KVQuant's own; an evaluation takes a comma list", decides=False,
        metavar="FILE",
    )  # fmt: skip
    export_kvquant: str | None = flag(None, "also write the quantizers as KVQuant does", decides=False, metavar="FILE")
    nuq: bool = flag(False, "short for --kv_format nuq: levels fitted by k-means (KVQuant)")
    klt: bool = flag(False, "short for --kv_format klt: transform coding, whose --abits may be fractions")
    klt_metric: str = flag(
        "fisher", "with --klt, in what metric channels are decorrelated and errors weighed", ("fisher", "pca")
    )
    predict: bool = flag(False, "with --klt, code only what the layer below does not predict")
    plot_bits: str | None = flag(
        None, "with --klt, draw how many bits each component of each layer has, as .png or .svg", picture,
        decides=False, metavar="FILE",
    )  # fmt: skip
    fisher: bool = flag(False, "with --nuq, weigh the fit by Fisher information")
    fisher_weighting: str = flag("paper", "Fisher information times the squared range, or alone", ("paper", "code"))
    norm: bool = flag(False, "Q-Norm: decoded levels keep mean and standard deviation")
    clamp: bool = flag(False, "uniform levels with an integer zero point")
    cap_outliers: float | None = flag(
        None, "at most this fraction of a token's keys stays exact", fraction, metavar="F"
    )
    calib_dataset: str = flag("wikitext2", "wikitext2, c4 or a text file", parsing.text_name, metavar="NAME")
    nsamples: int = flag(16, "calibration windows of --seqlen tokens", count(least=1, most=10**6), metavar="N")
    seed: int = flag(0, "seed of the places of calibration windows", count(least=0, most=2**63 - 1), metavar="N")


@dataclass(frozen=True)
class CalibratedFlags(CalibrationFlags, Flags):
    """The flags of the calibrated script."""

    groups = (*Flags.groups, CalibrationFlags)

    def refusals(self, given: Mapping[str, Any]) -> dict[str, bool]:
        """See Flags."""
        refused = [name for name in given if with_calibrate(name) == "refused"]
        misplaced = {
            f"--{' --'.join(refused)} is for an evaluation: leave it out with --calibrate":
                self.calibrate and bool(refused),
        }  # fmt: skip
        return misplaced | super().refusals(given) | {
            "--fisher weighs the fit of a NUQ codebook: add --nuq, or leave it out":
                self.fisher and "nuq" not in self.methods(),
            "--predict and --klt_metric are for transform coding: add --klt":
                (self.predict or self.klt_metric != "fisher") and not (self.shares_bits() or self.reads_file()),
            "--plot_bits shows how transform coding shares bits: add --klt, and a width below 16":
                self.plot_bits is not None and not (self.quantizes() and (self.shares_bits() or self.reads_file())),
            "--attribution takes layers apart, and here they are coded by what the one below does not predict: drop it":
                self.attribution and self.predicts(),
            f"--export_kvquant writes KVQuant's own file, which cannot hold {', '.join(self.methods())}":
                self.export_kvquant is not None
                and any(METHODS[name].quantizer != Method.quantizer for name in self.methods()),
            f"--clamp rounds the zero point of uniform levels, and {', '.join(self.methods())} has none":
                self.clamp and "uniform" not in self.methods(),
            f"--calibrate writes one file: name one in --quantizer_path, not {self.quantizer_path}":
                self.calibrate and len(self.quantizer_files) > 1,
            "--calibrate fits one method: name one in --kv_format":
                self.calibrate and len(self.kv_format) != 1,
            f"--calibrate has nothing to fit: {', '.join(self.methods())} needs no data":
                self.calibrate and self.quantizes() and not self.is_fitted(),
            "--cap_outliers caps nothing without --include_sparse and --perchannel":
                self.cap_outliers is not None and not (self.include_sparse and self.perchannel),
            "--export_kvquant writes one width: give one in --abits":
                self.export_kvquant is not None and len({*self.abits} - {BASELINE}) != 1,
            "--calibrate has nothing to fit at 16 bits: leave it out of --abits":
                self.calibrate and BASELINE in self.abits,
            "--quantizer_path FILE is missing: where --calibrate saves to, or saved to":
                self.quantizer_path is None and (self.calibrate or (self.quantizes() and self.needs_file())),
        }  # fmt: skip

    @property
    def quantizer_files(self) -> tuple[str, ...]:
        """The files that --quantizer_path names: several between commas."""
        path = self.quantizer_path
        return () if path is None else (path,) if os.path.exists(path) else tuple(path.split(","))

    def reads_file(self) -> bool:
        """Return whether quantizer files say which methods there are, beside those that the command names."""
        return not self.calibrate and self.quantizer_path is not None

    def shares_bits(self) -> bool:
        """Return whether a method shares bits between components."""
        return any(METHODS[name].shares_bits for name in self.methods())

    def predicts(self) -> bool:
        """Return whether some method predicts a layer from the one below."""
        return self.predict or any("predict" in METHODS[name].options for name in self.methods())

    def odd_widths(self) -> list[str]:
        """See Flags. In an evaluation the quantizer file says which method takes them."""
        return [] if self.reads_file() else super().odd_widths()

    def is_fitted(self) -> bool:
        """Return whether a calibration has something to fit in some format: its levels, or its ranges."""
        fitted = any(METHODS[name].calibrated for name in self.methods())
        return fitted or not all(pair.is_fixed for pair in self.kv_format)

    def needs_file(self) -> bool:
        """Return whether no format of the list does without a fit, or one that the command names cannot."""
        fitted = [name for pair in self.kv_format if pair.is_named for name in pair.methods if METHODS[name].calibrated]
        return bool(fitted) or not any(pair.is_fixed for pair in self.kv_format)

    def plan(self) -> Plan:
        """See Flags."""
        return replace(super().plan(), is_calibrated=True)

    def options(self) -> dict[str, tuple[str, Any]]:
        """See Flags."""
        fisher = self.fisher_weighting if self.fisher else None
        more: dict[str, tuple[str, Any]] = {"--clamp": ("integer_zero", self.clamp), "--norm": ("q_norm", self.norm)}
        more |= {"--cap_outliers": ("cap", self.cap_outliers), "--fisher": ("fisher", fisher)}
        more |= {"--predict": ("predict", "all" if self.predict else None)}
        more |= {"--klt_metric": ("metric", self.klt_metric if self.klt_metric != "fisher" else None)}
        return super().options() | {flag: option for flag, option in more.items() if option[1]}

    def vain(self, given: Mapping[str, Any]) -> list[str]:
        """See Flags."""
        unused = [name for name in given if self.calibrate and with_calibrate(name) == "unused"]
        found = super().vain(given) + [f"--{name} has no effect with --calibrate" for name in unused]
        is_vain = "fisher_weighting" in given and not self.fisher
        return found + ["--fisher_weighting has no effect without --fisher"] * is_vain


def with_calibrate(name: str) -> str:
    """Return what --calibrate does with a flag: used, refused or unused."""
    known = flag_fields(CalibratedFlags)
    return known[name].metadata["with_calibrate"] if name in known else "used"


def of_the_fit(flags: CalibratedFlags) -> dict[str, Any]:
    """Return {flag: value} of all that decides a fit: what the quantizer file holds."""
    settings = plain_settings(flags) | {"abits": [width.label for width in flags.abits]}
    known = flag_fields(QuantizationFlags) | flag_fields(CalibrationFlags)
    return {n: settings[n] for n, f in known.items() if f.metadata["decides"] and with_calibrate(n) == "used"}
