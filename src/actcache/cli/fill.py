"""``cachectl fill``: record a corpus."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from actcache.admin.display import binary, counted, entries, fields_as_json, span
from actcache.admin.inspection import open_space
from actcache.cli import corpus, options
from actcache.cli.common import print_json, quieten_transformers, say
from actcache.errors import OutOfSpaceError, UsageError, requires_extra
from actcache.format.arguments import nbytes_of
from actcache.format.keys import ModelWindows, Windows, document_key, windows
from actcache.format.media import Audio, By, Image
from actcache.segments.places import marker
from actcache.store.document_entries import check_found, find_entries
from actcache.store.space import Space
from actcache.store.store import Store, open_store

_LABELS = 10  # that are shown
_HELD = 128  # texts


@dataclass(frozen=True)
class _Item:
    """A document of the corpus, and its id there."""

    content: str | Image | Audio
    id: str | None

    def key(self) -> bytes:
        return document_key(self.content) if isinstance(self.content, str) else self.content.key()


@dataclass(frozen=True)
class _Given:
    """The documents of a corpus, and about how many there are, where that is known."""

    items: Iterator[_Item]
    count: int | None


@dataclass(frozen=True)
class _Streamed:
    """Documents that are streamed. There may be none: an iterator that gives nothing would be an error."""

    documents: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.documents)


@dataclass(frozen=True)
class _Counted(_Streamed):
    """The same, and about how many there are: a fill shows how far it is by ``len``."""

    count: int

    def __len__(self) -> int:
        return self.count


class _Notes:
    """The keys and ids of documents that pass through on their way to a fill; the documents are let go.

    Args:
        encoder: cuts them into passages; None where they are not cut so.
    """

    def __init__(self, encoder: Any = None) -> None:
        self._keys: list[bytes] = []
        self._ids: list[str | None] = []
        self._encoder = encoder
        self._outlines: list[Any] = []
        self._held: list[Any] = []  # texts that are to be cut

    def passing(self, documents: Iterable[_Item]) -> Iterator[_Item]:
        for document in documents:
            self._ids.append(document.id)
            if self._encoder is None:
                self._keys.append(document.key())
            else:
                self._held.append(document.content)
                if len(self._held) == _HELD:
                    self._cut()
            yield document

    def _cut(self) -> None:
        from actcache.models.passages import outline_of

        self._outlines.append(outline_of(self._encoder, self._held))
        self._held = []

    def put(self, store: Store, space: Space, name: str, windows: Windows | None) -> None:
        """Store a collection of the documents' entries, each document's windows, or passages, one after another.

        Where documents have ids, each entry has its document's; a document without one has an empty id.
        """
        has_ids = any(one is not None for one in self._ids)
        if self._encoder is not None:
            from actcache.models.passages import Outline

            self._cut()
            found = Outline.joined(self._outlines)
            names = [self._ids[document] or "" for document in found.documents.tolist()]
            more: dict[str, Any] = {"documents": found.documents, "own": found.own}
            store.put_collection(name, found.keys, names if has_ids else None, **more)
            return
        entries = find_entries(space, self._keys, windows)
        check_found(self._keys, entries)
        ids = [one or "" for one, theirs in zip(self._ids, entries, strict=True) for _ in theirs]
        store.put_collection(name, list(itertools.chain.from_iterable(entries)), ids if has_ids else None)


class KeyBy(StrEnum):
    content = "content"
    bytes = "bytes"


class TooLong(StrEnum):
    refuse = "refuse"
    truncate = "truncate"
    windows = "windows"


def fill(
    store: options.NewStore,
    source: Annotated[
        str,
        typer.Argument(
            help="A text file (a document a line); with --field .jsonl, .json, .csv, .tsv, .parquet, .arrow, "
            "also .gz, .bz2, .xz, .zst; a folder (of images or audio, too), a quoted pattern, a URL "
            "(s3://bucket/c/*.jsonl.gz); - for stdin.",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option(help="Model id or folder.")],
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            "--layers",
            help="Record the output of this layer: 1 to N, 0 for what goes into layer 1, -1 for N, last for what comes "
            "after the final norm. Several (3,6,last), all, or the option again: one pass records all, a space each.",
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Record the output of this module (layers.5.mlp), or what it is given (layers.5.mlp:input); may be "
            "repeated."
        ),
    ] = None,
    dtype: options.StoredDtype = None,
    max_error: Annotated[
        float | None,
        typer.Option(min=0, help="Relative error that storing may make, measured on the first documents; else refuse."),
    ] = None,
    metric: Annotated[str, typer.Option(help="Of what: rows, or hidden (the final hidden states).")] = "rows",
    field: options.Field = None,
    id_field: Annotated[str | None, typer.Option(help="The column or field of the documents' ids.")] = None,
    format: options.Format = None,
    collection: Annotated[
        str | None,
        typer.Option(
            help="Keep the corpus's order, and ids, as a collection of this name, once all of it is stored.",
            autocompletion=options.complete_collections,
        ),
    ] = None,
    key_by: Annotated[
        KeyBy, typer.Option(help="What the keys of images and audio are made from: what is decoded, or their files.")
    ] = KeyBy.content,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a document; default: what the model takes.")] = None,
    too_long: Annotated[TooLong, typer.Option(help="What becomes of longer documents.")] = TooLong.refuse,
    stride: Annotated[int, typer.Option(help="With --too-long windows: tokens that neighbours share.")] = 0,
    passages: options.Passages = None,
    context: options.Context = None,
    cut_by: options.CutByOption = None,
    least: options.Least = None,
    token_budget: Annotated[int, typer.Option(help="Padded tokens of a batch.")] = 8192,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="What the filled spaces may take (200GiB), all together, as du shows it; what was there before counts."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            "--device",
            help="Where to compute: cuda:0; several, as in cuda:0,cuda:1 or cpu,cpu, by a process each.",
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="Fill this share of the corpus alone: 0/8 to 7/8, a process each, on as many machines as there are."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Fill by the workers of this Ray cluster: auto (RAY_ADDRESS, one that runs here, or a new one), local "
            "(a new one here), host:6379, ray://host:10001.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: how many; default: one a GPU, or one a node where there is none."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there, how many bytes and how long it takes; store nothing.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compute and store what is missing of a corpus.

    What is stored already is skipped: an interrupted fill goes on where it was when it is run again. With --max-bytes,
    what is missing from the first document on that does not fit is left out (with several devices, from the first of
    each process's documents on): the exit code is 3, no collection is written, and run again with more bytes it goes
    on.

    Several machines share a corpus by --partition, whatever starts them, as srun cachectl fill ... --partition
    $SLURM_PROCID/$SLURM_NTASKS: no document is computed twice. One more fill without it finds all there, and writes the
    --collection.

    With --ray an actor on each GPU of a cluster computes, and writes to the store, which all nodes must see; what each
    has stored is told in the end. A worker that dies is replaced. It needs the extra ray.

    A folder of images or audio is filled with a model of such: labels are the names of its sub-folders, ids (of a
    --collection) the files' paths.

    Example: cachectl fill ./activations corpus.txt --model bert-base-uncased --layer 6
    """
    with requires_extra("models", "fill needs torch and transformers"):
        from actcache.admin.forecast import forecast
        from actcache.models import cluster, parallel
        from actcache.models.error_budget import peeked
        from actcache.models.filling import CHUNK
        from actcache.models.late_store import LateStore
        from actcache.models.partition import Partition
        from actcache.models.pretrained import load_tokenizer
        from actcache.models.processing import MediaEncoder
        from actcache.models.recyclers import Recyclers
        from actcache.models.remote import Blueprint, folder_or_id
        from actcache.models.tokenizing import DocumentEncoder

        quieten_transformers()
    cut = _windows(too_long, max_length, stride)
    spec = options.passages_of(passages, context, cut_by, least)
    if spec is not None and too_long is not TooLong.refuse:
        raise UsageError(f"--passages and --too-long {too_long.value}: documents are cut in one of these ways")
    if Path(store).is_file() and (Path(source) / marker.NAME).is_file():
        raise UsageError(f"the store comes first: cachectl fill {source} {store}")
    if collection is not None:
        Store.collection_blob(collection)  # a name that is none is refused before the work, not after it
    limit = None if max_bytes is None else nbytes_of("--max-bytes", max_bytes)
    places = [] if devices is None else [name.strip() for name in devices.split(",")]
    if len(places) > 1:
        parallel.check_devices(places)
    share = None if partition is None else Partition.parse(partition)
    if share is not None:
        _check_partition(collection, len(places), dry_run)
    _check_ray(ray, workers, {"--partition": partition, "--max-bytes": max_bytes, "--devices": places[1:]})
    where: dict[str, Any] = {"layers": _layers(layer or []), "sites": site or []}
    if not (layer or site):
        raise UsageError("say which --layer (6, all, last) or --site (layers.5.mlp) to record")
    settings: dict[str, Any] = {"dtype": dtype, "max_length": max_length, "too_long": cut or spec or too_long.value}
    # Ray's workers, which read images and audio by their paths, have other working directories.
    whole_path = ray is not None and "://" not in source and source != "-"
    with corpus.find_media(os.path.abspath(source) if whole_path else source, format) as media:
        given: _Given
        if media is None:
            given = _of_texts(source, field, id_field, format)  # which refuses a file that is not there
            if key_by is not KeyBy.content:
                raise UsageError("--key-by is for images and audio: a text's key is of its characters")
        else:
            if field is not None or id_field is not None:
                raise UsageError(f"{media.kind} have no fields: leave --field and --id-field out")
            if len(places) > 1:
                raise UsageError(f"several --devices are for texts: {media.kind} are computed by one, or by --ray")
            media.check()
            by: By = "bytes" if key_by is KeyBy.bytes else "content"
            given = _of_media(media, by)
            settings["key_by"] = by
            if spec is not None:
                raise UsageError(f"--passages are of texts: {media.kind} are whole")
        cutter = None if spec is None or collection is None else DocumentEncoder(load_tokenizer(model), None, spec)
        notes = None if collection is None else _Notes(cutter)
        documents: Iterable[Any]
        streamed = (one.content for one in (given.items if notes is None else notes.passing(given.items)))
        documents = _Streamed(streamed) if given.count is None else _Counted(streamed, given.count)
        if dry_run:
            found = forecast(store, documents, model, **where, devices=places or [None], max_bytes=limit, **settings)
            _show_forecast(store, found, too_long, as_json)
            return
        working: dict[str, Any] = {"token_budget": token_budget, "progress": not quiet, "max_bytes": limit}
        working |= {"max_error": max_error, "metric": metric}
        if ray is not None:
            blueprint = Blueprint(Recyclers.from_pretrained, folder_or_id(model), store, {**where, **settings})
            del working["max_bytes"]
            address, device = None if ray == "auto" else ray, places[0] if places else None
            working["chunk"] = CHUNK if media is None else MediaEncoder.chunk
            report = cluster.fill(documents, blueprint, address=address, workers=workers, device=device, **working)
        elif len(places) > 1:
            report = parallel.fill(documents, model, devices=places, store=store, **where, **working, **settings)
        else:
            device = places[0] if places else None
            place: Any = store
            if media is None:  # what cannot be stored is found out before a store or space is made
                first, documents = peeked(documents, CHUNK)
                place = LateStore(store, [one for one in first if share is None or share.has(document_key(one))])
            with Recyclers.from_pretrained(model, **where, store=place, device=device, **settings) as recyclers:
                report = recyclers.fill(documents, **working, partition=share)
        labels = {} if media is None else media.labels()
    written = None if report.left_out else collection
    if written is not None and notes is not None:
        with open_store(store) as standing, open_space(standing, next(iter(report.spaces.values()))) as space:
            most = space.recipe.max_length
            cut = cut.of(most) if isinstance(cut, ModelWindows) and most is not None else cut
            notes.put(standing, space, written, cut if isinstance(cut, Windows) else None)
    _tell(store, report, written, labels, as_json)
    if report.left_out:
        unwritten = "" if collection is None else f" The collection {collection!r} was not written."
        raise OutOfSpaceError(
            f"{counted(report.left_out, 'document')} of {report.documents:,} left out: no more fit within "
            f"--max-bytes {max_bytes}; run it again with more bytes to go on.{unwritten}"
        )


def _check_partition(collection: str | None, devices: int, dry_run: bool) -> None:
    if collection is not None:
        raise UsageError(
            "--partition fills a share, and a --collection is of all: run it once more without --partition when all "
            "shares are filled"
        )
    if devices > 1:
        raise UsageError("--partition is for a process with one device: start a process for each of the --devices")
    if dry_run:
        raise UsageError("--dry-run looks at the whole corpus: leave --partition out")


def _check_ray(ray: str | None, workers: int | None, others: dict[str, Any]) -> None:
    if ray is None:
        if workers is not None:
            raise UsageError("--workers are those of a Ray cluster: say which by --ray (auto, local, an address)")
        return
    given = [name for name, value in others.items() if value]
    if given:
        raise UsageError(f"--ray deals documents out to its own workers: leave {given[0]} out")


def _of_texts(source: str, field: str | None, id_field: str | None, format: str | None) -> _Given:
    corpus.check(source, field, id_field, format)
    items = (_Item(one.text, one.id) for one in corpus.read(source, field, id_field, format))
    return _Given(items, corpus.count(source, field, format))


def _of_media(media: corpus.Media, by: By) -> _Given:
    return _Given((_Item(one.content, one.id) for one in media.documents(by)), len(media))


def _layers(given: list[str]) -> list[int | str] | str:
    """Return the layers that were asked for, as ``Recyclers`` takes them."""
    words = [word.strip() for text in given for word in text.split(",")]
    if "all" in words:
        if len(words) > 1:
            raise UsageError("--layers all is all of them, 0 to N: leave the others out")
        return "all"
    found: list[int | str] = []
    for word in words:
        try:
            found.append(word if word == "last" else int(word))
        except ValueError:
            raise UsageError(
                f"--layer {word!r} is none: layers are numbers, last, or all; a module is a --site"
            ) from None
    return found


def _windows(too_long: TooLong, max_length: int | None, stride: int) -> Windows | ModelWindows | None:
    if too_long is not TooLong.windows:
        if stride:
            raise UsageError("--stride is for --too-long windows")
        return None
    return windows(max_length, stride)


def _tell(store: str, report: Any, collection: str | None, labels: dict[str, int], as_json: bool) -> None:
    spaces = list(report.spaces.values())
    if as_json:
        more = {"labels": labels} if labels else {}
        filled = [
            {"space": one, "layer": None, "site": None, "layer" if isinstance(where, int) else "site": where}
            for where, one in report.spaces.items()
        ]
        print_json({"store": store, **fields_as_json(report), "spaces": filled, "collection": collection, **more})
        return
    rate = report.tokens / report.seconds if report.seconds else 0.0
    if report.passages:
        share = report.reused_tokens / max(1, report.reused_tokens + report.tokens)
        say(
            f"{report.passages:,} passages: {report.new_passages:,} computed; {share:.1%} of the tokens were there, or "
            "stand there several times"
        )
    say(
        f"{report.documents:,} documents: {report.computed:,} computed ({report.tokens:,} tokens, "
        f"{rate:,.0f} tokens/s), {report.present:,} were there; "
        f"{'space' if len(spaces) == 1 else 'spaces'} {', '.join(spaces)}"
    )
    for one in report.contributions:
        say(
            f"  {one.partition} on {one.worker}: {entries(one.entries)}, {one.tokens:,} tokens, "
            f"{binary(one.nbytes)} in {counted(one.segments, 'segment')}, {span(one.seconds)}"
        )
    if labels:
        shown = ", ".join(f"{label} {number:,}" for label, number in list(labels.items())[:_LABELS])
        say(f"{counted(len(labels), 'label')}: {shown}{', ...' if len(labels) > _LABELS else ''}")


def _show_forecast(store: str, found: Any, too_long: TooLong, as_json: bool) -> None:
    if as_json:
        print_json({"store": store, **fields_as_json(found)})
        return
    missing = found.documents - found.present
    say(f"{found.documents:,} documents: {found.present:,} are there, {missing:,} to compute")
    if found.passages:
        missing = found.new_passages
        say(f"{found.passages:,} different passages, {missing:,} of them to compute")
    say(f"about {found.tokens:,} tokens, {binary(found.nbytes)}, {span(found.seconds)} of computing")
    if found.too_long:
        many = f"{counted(found.too_long, 'document')} longer than the {found.max_length} tokens that one may have"
        where = f"the first is document {found.first_too_long}"
        if too_long is TooLong.refuse:
            say(f"{many} ({where}): a fill stops there. --too-long truncate cuts them, --too-long windows keeps all")
        else:
            say(f"{many} ({where}) will be cut")
    if found.fits is not None:
        say("all of it fits" if found.fits == missing else f"about {found.fits:,} of the {missing:,} fit")
