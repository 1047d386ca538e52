"""``cachectl plan``: does caching pay?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from actcache.admin import fleet, planning
from actcache.admin.display import binary, fields_as_json, span
from actcache.admin.fleet import FleetEstimate, Nodes, ObjectStore
from actcache.admin.planning import CorpusSize, Disk, Estimate, ModelCosts, Prices
from actcache.cli import corpus, options
from actcache.cli.common import console, place_of, print_json, quieten_transformers, say, table
from actcache.errors import UsageError, requires_extra
from actcache.format.arguments import nbytes_of
from actcache.store.stored_errors import StoredErrors

_SAMPLE = 5000  # documents whose lengths are looked at
_MONTHS = {"cloud": ".2f", "paper_cloud": ".2f", "local": ".1f", "paper_local": ".1f"}


def plan(
    source: Annotated[
        str | None, typer.Argument(help="The corpus, as of fill; its lengths are measured.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model id or folder, measured on this machine.")] = None,
    layer: Annotated[str | None, typer.Option(help="The layer to cache: 0 to N, -1 for N, or last.")] = None,
    site: Annotated[
        str | None, typer.Option(help="In its place, the module to cache: layers.5.mlp, or layers.5.mlp:input.")
    ] = None,
    field: options.Field = None,
    format: options.Format = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a document; default: what the model takes.")] = None,
    passages: options.Passages = None,
    context: options.Context = None,
    cut_by: options.CutByOption = None,
    least: options.Least = None,
    revision_of: Annotated[
        str | None,
        typer.Option(help="The corpus as it was when it was filled: what it has already is not computed again."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, e.g. cuda:0.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Such devices that compute at the same time.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="How rows are stored: float16, int8, ...", autocompletion=options.complete_dtypes)
    ] = "float16",
    folder: Annotated[Path, typer.Option(help="Whose disk is measured.")] = Path("."),
    documents: Annotated[int | None, typer.Option(min=1, help="Without a corpus: how many documents ...")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="... of so many tokens each.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Without a model: its hidden size ...")] = None,
    full_ms: Annotated[float | None, typer.Option(min=0, help="... its milliseconds a document ...")] = None,
    upper_ms: Annotated[
        float | None, typer.Option(min=0, help="... and those of the layers above the cached one.")
    ] = None,
    read: Annotated[str | None, typer.Option(help="Bytes a second that the disk reads (2GB), not measured.")] = None,
    write: Annotated[str | None, typer.Option(help="Bytes a second that it writes.")] = None,
    device_hour: Annotated[float | None, typer.Option(min=0, help="Price of an hour of a device.")] = None,
    gib_month: Annotated[float | None, typer.Option(min=0, help="Price of a month of a GiB of storage.")] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Machines with --devices each, which fill and read an object store: requests, index, prices."
        ),
    ] = None,
    network: Annotated[str, typer.Option(help="With --nodes: bytes a second of a machine's network.")] = "12.5GB",
    cores: Annotated[int, typer.Option(min=1, help="With --nodes: cores of a machine.")] = 64,
    request_ms: Annotated[
        float, typer.Option(min=0.01, help="With --nodes: milliseconds until the store answers a request.")
    ] = 30.0,
    paper: Annotated[bool, typer.Option("--paper", help="Show the paper's Table 7 beside ours.")] = False,
    as_json: options.Json = False,
) -> None:
    """Say whether caching pays: bytes, time to fill, a pass with and without, and from which pass on.

    Measures the model's layers and the disk on this machine, or takes the numbers that are given. At a --site, and at
    layers from which nothing starts (0, the last), a pass is one that reads the rows, or computes them. With both
    prices it also says how often a pass has to be made for the storage to pay. Says so where caching loses. With
    --nodes, what that many machines take of an object store (docs/scale.md).

    Example: cachectl plan corpus.txt --model bert-base-uncased --layer 6 --folder ./activations
    """
    if paper:
        _show_paper(as_json)
        return
    if (device_hour is None) != (gib_month is None):
        raise UsageError("--device-hour and --gib-month go together: the price of computing and that of storing")
    spec = options.passages_of(passages, context, cut_by, least)
    if source is None and (spec is not None or revision_of is not None):
        raise UsageError("--passages and --revision-of are of a corpus: give its file")
    revised = None
    prices = None if device_hour is None or gib_month is None else Prices(device_hour, gib_month)
    if source is not None:
        place = place_of(layer, site)
        if model is None or place is None:
            raise UsageError(
                "with a corpus, say which --model and --layer or --site; without, give --documents, --tokens, ..."
            )
        load, costs, errors = _measured(source, field, format, model, place, device, max_length, dtype)
        if spec is not None or revision_of is not None:
            cut, revised = _cut(source, revision_of, field, format, model, place, max_length, dtype, spec)
            load = load if cut is None else cut
    else:
        if documents is None or tokens is None or hidden is None or full_ms is None or upper_ms is None:
            raise UsageError(
                "give a corpus with --model and --layer, or --documents, --tokens, --hidden, --full-ms and --upper-ms"
            )
        load, errors = CorpusSize(documents, documents * tokens), {}
        costs = ModelCosts(full_ms / 1e3 / tokens, upper_ms / 1e3 / tokens, hidden)
    known = errors.get(dtype)
    bits = None if known is None else known.bits
    if nodes is not None:
        if read is not None or write is not None:
            raise UsageError("--nodes plans for an object store, which --network reaches; give no --read and --write")
        machines = Nodes(
            nodes, devices, float(nbytes_of("--network", network)), request_seconds=request_ms / 1e3, cores=cores
        )
        store = ObjectStore() if gib_month is None else ObjectStore(gib_month=gib_month)
        _show_fleet(
            load,
            costs,
            machines,
            store,
            fleet.estimate(load, costs, dtype, machines, store, bits=bits),
            prices,
            None if revised is None else (revised, _refilled(revised, costs, machines.processes, machines.uplink)),
            as_json,
        )
        return
    if read is not None and write is not None:
        disk = Disk(float(nbytes_of("--read", read)), float(nbytes_of("--write", write)))
    elif read is None and write is None:
        disk = planning.measure_disk(folder)
    else:
        raise UsageError("--read and --write go together")
    found = planning.estimate(load, costs, dtype, disk, bits=bits, devices=devices, prices=prices)
    codecs = planning.by_codec(load, costs, disk, dict(errors), devices=devices, prices=prices)
    again = None if revised is None else _refilled(revised, costs, devices, disk.write)
    if as_json:
        inputs = {"corpus": load, "model": costs, "disk": disk, "devices": devices, "dtype": dtype}
        rows = [fields_as_json(one) for one in codecs]
        more = {} if revised is None or again is None else _revision_as_json(revised, again)
        print_json({**inputs, **fields_as_json(found, "break_even", "verdict"), "codecs": rows, **more})
        return
    _show(load, costs, disk, found)
    if revised is not None and again is not None:
        _show_revision(revised, again)
    _show_codecs(codecs)


def _measured(
    source: str,
    field: str | None,
    format: str | None,
    model: str,
    place: int | str,
    device: str | None,
    max_length: int | None,
    dtype: str,
) -> tuple[CorpusSize, ModelCosts, dict[str, StoredErrors | None]]:
    with requires_extra("models", "measuring needs torch and transformers"):
        from actcache.models.error_budget import errors_by_codec
        from actcache.models.timing import measure

        quieten_transformers()
    texts = [document.text for document in corpus.read(source, field, format=format)]
    if not texts:
        raise UsageError(f"{source} holds no documents")
    sample = texts[:: -(-len(texts) // _SAMPLE)]
    timing = measure(model, sample, layer=place, device=device, max_length=max_length)
    tokens = round(sum(timing.lengths) / len(sample) * len(texts))
    known: dict[str, Any] = {"layer": place, "device": device, "max_length": max_length}
    errors = errors_by_codec(model, sample, dtypes={*planning.codecs(measured=True), dtype}, **known)
    # Where no reduced model starts, rows are for reading: a pass computes as far as there, or reads them.
    full, upper = (timing.full, timing.upper) if timing.starts else (timing.lower, 0.0)
    return CorpusSize(len(texts), tokens), ModelCosts(full, upper, timing.hidden_size), errors


def _cut(
    source: str,
    old: str | None,
    field: str | None,
    format: str | None,
    model: str,
    place: int | str,
    max_length: int | None,
    dtype: str,
    spec: Any,
) -> tuple[CorpusSize | None, Any]:
    """Return the size of a corpus that is cut into passages, and what it costs as a revision of another one."""
    from actcache.admin.revision import revision

    def texts(name: str) -> Any:
        return (one.text for one in corpus.read(name, field, format=format))

    known: dict[str, Any] = {"layer": place, "dtype": dtype, "max_length": max_length, "too_long": spec}
    load = None
    if spec is not None:
        alone = revision([], texts(source), model, **known)
        load = CorpusSize(alone.new_passages, alone.new_tokens, alone.tokens, alone.passages)
    return load, None if old is None else revision(texts(old), texts(source), model, **known)


def _refilled(revised: Any, costs: ModelCosts, devices: int, written: float) -> float:
    """Return the seconds in which a revision is filled; ``written``: bytes a second."""
    return float(max(revised.new_tokens * costs.lower / devices, revised.new_nbytes / written))


def _revision_as_json(revised: Any, seconds: float) -> dict[str, Any]:
    return {"revision": {**fields_as_json(revised, "reused"), "seconds": seconds}}


def _show_revision(revised: Any, seconds: float) -> None:
    say(
        f"as a revision: {revised.reused:.1%} of the tokens are used again; {revised.new_tokens:,} to compute, "
        f"{binary(revised.new_nbytes)}; filled in {span(seconds)}"
    )


def _show(load: CorpusSize, costs: ModelCosts, disk: Disk, found: Estimate) -> None:
    _show_corpus(load)
    say(f"model: {costs.full * 1e6:,.1f} us a token, {costs.upper * 1e6:,.1f} of them above the cached layer")
    say(f"disk: reads {binary(disk.read)}/s, writes {binary(disk.write)}/s")
    say(f"needs {binary(found.nbytes)}; filled in {span(found.fill)}")
    say(f"one pass: {span(found.recompute)} computed, {span(found.replay)} from the cache")
    say(found.verdict)


def _show_corpus(load: CorpusSize) -> None:
    what = "documents" if load.passed is None else "different passages"
    again = "" if load.passed is None else f"; a pass reads {load.reads_of_pass:,} of {load.passed:,}"
    say(f"corpus: {load.documents:,} {what}, {load.tokens:,} tokens{again}")


def _show_fleet(
    load: CorpusSize,
    costs: ModelCosts,
    nodes: Nodes,
    store: ObjectStore,
    found: FleetEstimate,
    prices: Prices | None,
    revised: tuple[Any, float] | None,
    as_json: bool,
) -> None:
    if as_json:
        inputs = {"corpus": load, "model": costs, "nodes": nodes, "object_store": store}
        print_json(
            {**inputs, **fields_as_json(found, "verdict"), **({} if revised is None else _revision_as_json(*revised))}
        )
        return
    _show_corpus(load)
    say(f"{nodes.count} machines of {nodes.devices} devices, which read {binary(nodes.network)}/s each")
    say(f"needs {binary(found.nbytes)} in {found.segments:,} segments; ${found.storage_month:,.0f} a month")
    say(f"index: {binary(found.index_bytes)}, which each process fetches and maps: {span(found.open_seconds)} to begin")
    say(f"memory of a process that reads all of it: {binary(found.process_memory)}, beside the mapped index")
    hours = f"{found.device_hours:,.0f} hours of a device"
    hours += "" if prices is None else f" (${found.device_hours * prices.device_hour:,.0f})"
    say(
        f"fill: {span(found.fill)}, {hours}, bound by {found.fill_bound}; {found.fill_puts:,} requests, "
        f"{found.fill_puts_per_second:,.1f} a second, ${found.fill_requests:,.2f}; "
        f"{binary(found.fill_index_bytes)} of index written"
    )
    say(
        f"a pass: {span(found.replay)}, bound by {found.replay_bound}; {found.replay_gets:,} requests, "
        f"{found.replay_gets_per_second:,.0f} a second, ${found.replay_requests:,.2f}"
    )
    if revised is not None:
        _show_revision(*revised)
    say(f"compaction: {binary(found.compaction_bytes)} read and written, {span(found.compaction)} at least")
    say(found.verdict)


def _show_codecs(codecs: list[planning.CodecEstimate]) -> None:
    shown = table(
        "codecs", ("codec",), ("bytes", "rows off by", "hidden states", "decode", "filled in", "a pass", "pays")
    )
    for one in codecs:
        rows, hidden = one.rows_error, one.hidden_error
        shown.add_row(
            one.dtype,
            binary(one.estimate.nbytes),
            "refused" if one.refused else "" if rows is None else f"{rows:.1e}",
            "" if hidden is None else f"{hidden:.1e}",
            f"{binary(one.decode)}/s",
            span(one.estimate.fill),
            span(one.estimate.replay),
            "never" if one.estimate.break_even is None else f"from pass {one.estimate.break_even} on",
        )
    console().print(shown)


def _show_paper(as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for one in planning.PAPER:
        cloud, local = one.months()
        given = {"paper_cloud": one.cloud, "paper_local": one.local}
        rows.append({"model": one.model, "cloud": cloud, "local": local, **given})
    if as_json:
        print_json({"months": rows})
        return
    shown = table("months between passes, at most", ("model",), ("cloud", "in the paper", "local", "in the paper "))
    for row in rows:
        months = (f"{row[name]:{form}}" for name, form in _MONTHS.items())
        shown.add_row(row["model"], *months)
    console().print(shown)
