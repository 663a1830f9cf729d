#!/usr/bin/env python3
"""What a KVQuant KV cache costs a language model in perplexity: calibrate once, then evaluate.

With --calibrate, ranges of the keys and, with --nuq, codebooks of keys and values are fitted on sample text and saved
to --quantizer_path. Without it they are read from there, with every quantization setting that the command leaves out.
Quantization is simulated: this measures accuracy, and saves neither memory nor time.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load ends the process without a traceback

import shlex
import sys

from simquant import processes, run, stored
from simquant.calibrated_flags import CalibratedFlags, of_the_fit
from simquant.command_line import parse
from simquant.endings import exit_status
from simquant.flags import Flags

EXAMPLES = """examples:
  %(prog)s meta-llama/Llama-3-8B --calibrate --abits 3 --nuq --fisher --include_sparse --quantizer_path nuq3.pkl
  %(prog)s meta-llama/Llama-3-8B --quantizer_path nuq3.pkl --datasets wikitext2,c4 --output nuq3.json
  %(prog)s meta-llama/Llama-3-8B --calibrate --abits 4,3,2 --nuq --quantizer_path nuq.pkl     three widths in one pass
  %(prog)s meta-llama/Llama-3-8B --quantizer_path nuq.pkl --baseline --plot nuq.png           all, against fp16
"""

SHARED = ("revision", "dtype", "device", "attn_implementation", "text_column", "bos")  # with an evaluation of the fit
QUANTIZER_FILES = (b"PK", b"\x80")  # how they begin: ours is a zip archive, KVQuant's a pickle


def fit(flags: CalibratedFlags, model, windows) -> tuple[dict, dict]:
    """Return ({row: setting} fitted to windows [N,T], {(row, site): how well}). Processes share the gradients."""
    from simquant import calibration, memory
    from simquant.fits import Fit

    (_, settings), gradients, fits = run.settings_of(model, flags, [(flags.plan(), None)]), None, {}

    def on_fit(row, site, quantizer, x, given) -> None:
        """Note how well a quantizer fits its own calibration text."""
        fits[row, site] = Fit.of(quantizer, x, given)

    with memory.checkpointing_if_short(model, flags.seqlen):
        needing = any(each.needs_gradient for setting in settings.values() for each in setting.values())
        if needing and processes.count() > 1:
            mine, places = windows[processes.index() :: processes.count()], calibration.places_of(*settings.values())
            gradients = processes.interleave(calibration.record(model, places, mine, gradients=True))
        return calibration.calibrate(model, windows, settings, gradients, on_fit), fits


def calibrate(flags: CalibratedFlags, given: dict) -> None:
    """Fit, print how well the quantizers fit, save them, and print how to evaluate them."""
    run.begin(flags, given)
    from simquant import describe, files, memory, models, text_names, texts
    from simquant.fits import fit_table

    written, read = [flags.quantizer_path, flags.export_kvquant], [*text_names.files_read(flags.calib_dataset)]
    files.check_writable([*written, flags.plot_bits], [*read, flags.model])
    if not flags.overwrite:
        files.check_replaceable(written, QUANTIZER_FILES)
        files.check_replaceable([flags.plot_bits], files.PICTURES)
    config, tokenizer = models.load_config_and_tokenizer(flags.model, flags.revision)
    windows, shape = texts.load_for_calibration(flags, config, tokenizer), models.skeleton(flags, config)
    sites, settings = run.settings_of(shape, flags, [(flags.plan(), None)])
    memory.check_host_memory(windows, settings, shape.dtype)
    memory.warn_of_few_tokens(windows, settings)
    if flags.dry_run:
        describe.print_plan(flags, shape, sites, settings, {flags.calib_dataset: windows})
        return
    fitted, fits = fit(flags, models.load_model(flags, config), windows)
    if processes.index() > 0:
        return
    made_for = {"name": config.name_or_path, "type": config.model_type, "channels": {s.name: s.channels for s in sites}}
    try:
        print(fit_table(fits, list(fitted)), flush=True)
    finally:  # a reader that has left loses nothing
        save(flags, fitted, made_for)
    print(f"\nSaved to {flags.quantizer_path}. To evaluate:\n{evaluation_command(flags)}")


def save(flags: CalibratedFlags, fitted: dict, made_for: dict) -> None:
    """Write the files that the flags name."""
    from simquant import component_plots, kvquant_file, models, quantizer_file

    about = {"model": made_for, "settings": of_the_fit(flags), "calibration": {"seqlen": flags.seqlen}}
    quantizer_file.save(flags.quantizer_path or "", fitted, about | {"versions": models.versions()})
    try:
        if flags.export_kvquant is not None:
            kvquant_file.export(flags.export_kvquant, run.narrowest(fitted))
        if flags.plot_bits is not None:
            component_plots.save_bits(flags.plot_bits, flags, fitted)
    except OSError as error:
        raise OSError(f"{error}; {flags.quantizer_path!r} is saved") from error


def evaluation_command(flags: CalibratedFlags) -> str:
    """Return the command that evaluates what was saved, on the text and the device of the calibration."""
    words = [
        sys.argv[0],
        flags.model,
        "--quantizer_path",
        flags.quantizer_path or "",
        "--datasets",
        flags.calib_dataset,
    ]
    given = {name: getattr(flags, name) for name in SHARED if getattr(flags, name) != getattr(Flags, name)}
    more = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python3", *words, "--seqlen", str(flags.seqlen), *more])


def main() -> None:
    """Calibrate, evaluate, or set saved reports side by side."""
    flags, given = parse(CalibratedFlags, __doc__, EXAMPLES)
    if flags.compare:
        run.compare(flags)
    elif flags.calibrate:
        calibrate(flags, given)
    else:
        flags, sources = stored.sources_of(flags, given)
        run.evaluate(flags, given, sources)


if __name__ == "__main__":
    sys.exit(exit_status(main))
