"""The options of the command `bench`, in the order of its help. It shares others with `options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpcmref.cli.options import parse_jobs

FoldersArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[FOLDER]...", help="Folders of images, and images.")
]
CodecsOption = Annotated[
    str | None,
    typer.Option(
        "--codecs",
        metavar="LIST",
        help="hpcmref, jpeg, webp, avif, jxl, with commas between; Pillow's save options may follow: "
        "avif:speed=0+subsampling=4:2:0. hpcmref always writes the learned stream; hpcmref:choose=1 may write a "
        "lossless one, as encode does. By default all that are installed.",
    ),
]
ModelsOption = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar="LIST",
        help="Models of hpcmref, with commas between: names or .safetensors files; NAME=FILE gives another name, "
        "NAME=FILE+FILE+... makes one curve of models of one rate.",
    ),
]
QualitiesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--qualities",
        metavar="[CODEC=]LIST",
        help="What to measure: 8,16,24 or 0:63:9, for hpcmref, or for another codec: jpeg=30,60,90. Repeatable.",
    ),
]
EncoderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        metavar="NAME=ENCODE|DECODE",
        help="Measure other programs too: 'NAME=cjxl {in} {out}.jxl -q {q}|djxl {out}.jxl {png}', with --qualities "
        "NAME=LIST. They are run without a shell; docs/bench.md has recipes. Repeatable.",
    ),
]
TimeLimitOption = Annotated[
    float,
    typer.Option("--time-limit", min=0.1, metavar="SECONDS", help="How long a command of --encoder may take."),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="bpp=LIST",
        help="Compare at equal size: for every image each codec uses the quality whose file comes nearest to these "
        "bits per pixel, as in bpp=0.25,0.5.",
    ),
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="LIST",
        help="Which to measure besides PSNR: ms-ssim, ssimulacra2, cvvdp. By default all that are installed.",
    ),
]
GenerationsOption = Annotated[
    int | None,
    typer.Option(
        "--generations",
        min=1,
        metavar="N",
        help="Encode and decode each image N times in a row, and compare the results with the original.",
    ),
]
ResultsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--results",
        metavar="NAME|FILE",
        help="Fixed results to compare with: kodak, clic-professional-valid, clic2020-professional, tecnick, "
        "or a JSON file (an earlier --json, for one). Repeatable.",
    ),
]
AnchorOption = Annotated[
    str | None,
    typer.Option("--anchor", metavar="CODEC", help="What BD-rates are against. By default VTM, or else JPEG."),
]
RangeOption = Annotated[
    str | None,
    typer.Option(
        "--range",
        metavar="LOW:HIGH",
        help="Restrict BD-rates to these bits per pixel: points outside are left out, and both curves are "
        "interpolated at the ends.",
    ),
]
KodakOption = Annotated[
    str | None,
    typer.Option("--kodak", metavar="DIR", help="The folder of the 24 Kodak images."),
]
ClicOption = Annotated[
    str | None,
    typer.Option("--clic", metavar="DIR", help="The folder of the 41 images of CLIC professional validation."),
]
TecnickOption = Annotated[
    str | None, typer.Option("--tecnick", metavar="DIR", help="The folder of the 100 Tecnick images.")
]
RepeatOption = Annotated[
    int, typer.Option("--repeat", min=1, metavar="N", help="Measure every time N times, and report the median.")
]
JobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        parser=parse_jobs,
        metavar="N|auto",
        help="The number of processes. With more than one, the measured times are longer.",
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Use the first N images.")]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="FILE",
        help="Append every measurement to FILE, and do not repeat those that it contains already.",
    ),
]
JsonFileOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write all results as JSON, which --results can read. - is standard output; tables then go to "
        "standard error.",
    ),
]
CsvFileOption = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        metavar="FILE",
        help="Write averages and measurements, with tabs if FILE ends with .tsv; - is standard output, as above.",
    ),
]
ProfileOption = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Measure how long each stage of hpcmref takes, on the first image or a generated one of 768x512. "
        "Here, a model may also be a preset without weights: base, large, phi, light.",
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", help="Write a page with curves, tables and a viewer, and PNG curves."),
]
