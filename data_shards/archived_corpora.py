"""The catalogue's corpora that come as archives: those of the paper, and IWSLT 2014.

None of the archives could be fetched where this was written. Addresses, member names, sizes and
checksums are those that others have published (``checksum_source`` says who); a download that does
not fit them is refused.
"""

from __future__ import annotations

from data_shards.archives import Archive, ArchivedEntry, Part, PublishedStatistics
from data_shards.download import Expected

_TFDS = "tensorflow/datasets, tensorflow_datasets/url_checksums/{}.txt at 333639b"
_SACREBLEU = "sacreBLEU 2.6, sacrebleu/dataset/__init__.py"

_EUROPARL = Archive(
    "https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz",
    Expected(
        sha256="0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
        num_bytes=657_632_379,
    ),
    _TFDS.format("wmt14_translate"),
)
_COMMON_CRAWL = Archive(
    "https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz",
    Expected(
        sha256="c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
        num_bytes=918_311_367,
    ),
    _TFDS.format("wmt14_translate"),
)
_NEWS_COMMENTARY = Archive(
    "https://www.statmt.org/wmt14/training-parallel-nc-v9.tgz",
    Expected(
        sha256="cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
        num_bytes=80_418_416,
    ),
    _TFDS.format("wmt14_translate"),
)
_UN = Archive(
    "https://www.statmt.org/wmt13/training-parallel-un.tgz",
    Expected(
        sha256="29141b5c1eba149a94f7a59d3b1a834b2e47fe0f8758d68dcd77a3d3f497ee47",
        num_bytes=2_365_634_246,
    ),
    _TFDS.format("wmt15_translate"),
)
_GIGA = Archive(
    "https://www.statmt.org/wmt10/training-giga-fren.tar",
    Expected(
        sha256="3ff8319f6919393520559bfbc7ad6a747ec81b3abc7be9993b338d4b017b4d9a",
        num_bytes=2_595_102_720,
    ),
    _TFDS.format("wmt15_translate"),
)
# No sha256 of these three is published: their md5 is checked, and the sha256 seen first is kept.
_NEWSTEST_2013 = Archive(
    "https://www.statmt.org/wmt13/test.tgz",
    Expected(md5="48eca5d02f637af44e85186847141f67"),
    _SACREBLEU,
)
_NEWSTEST_2014 = Archive(
    "https://www.statmt.org/wmt14/test-full.tgz",
    Expected(md5="a8cd784e006feb32ac6f3d9ec7eb389a"),
    _SACREBLEU,
)
_IWSLT_2014 = Archive(
    "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz",
    Expected(md5="10936dfdf616504ddbd844e91b94ef4a", num_bytes=19_982_877),
    "a public script around fairseq's prepare-iwslt14.sh (md5), a log of its download (size)",
)

_WMT14_LICENCE = (
    "published for research by the Workshop on Statistical Machine Translation; the parts have "
    "terms of their own: see https://www.statmt.org/wmt14/translation-task.html"
)
_WMT14_CITATION = "Bojar et al. 2014 (W14-3302)"
_NEWSTEST_2013_PART = Part("test.tgz", "newstest2013-src.{language}.sgm", "segments")

WMT14_EN_DE = ArchivedEntry(
    name="wmt14-en-de",
    languages=("en", "de"),
    folder="wmt14",
    archives=(_EUROPARL, _COMMON_CRAWL, _NEWS_COMMENTARY, _NEWSTEST_2013, _NEWSTEST_2014),
    parts={
        "train": (
            Part("training-parallel-europarl-v7.tgz", "europarl-v7.de-en.{language}"),
            Part("training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{language}"),
            Part("training-parallel-nc-v9.tgz", "news-commentary-v9.de-en.{language}"),
        ),
        "valid": (_NEWSTEST_2013_PART,),
        "test": (Part("test-full.tgz", "newstest2014-deen-{role}.{language}.sgm", "segments"),),
    },
    licence=_WMT14_LICENCE,
    citation=_WMT14_CITATION,
    statistics=PublishedStatistics(
        num_pairs=4_500_966,
        # 132,886,171 and 137,628,246 pieces.
        mean_pieces={"en": 132_886_171 / 4_500_966, "de": 137_628_246 / 4_500_966},
        source="fairseq-preprocess of 2020-07-02 over Google's wmt16_en_de (32,000 shared BPE "
        "merges), the preparation that stands for WMT14 in most later work",
    ),
)

WMT14_EN_FR = ArchivedEntry(
    name="wmt14-en-fr",
    languages=("en", "fr"),
    folder="wmt14",
    archives=(
        _EUROPARL,
        _COMMON_CRAWL,
        _UN,
        _NEWS_COMMENTARY,
        _GIGA,
        _NEWSTEST_2013,
        _NEWSTEST_2014,
    ),
    parts={
        "train": (
            Part("training-parallel-europarl-v7.tgz", "europarl-v7.fr-en.{language}"),
            Part("training-parallel-commoncrawl.tgz", "commoncrawl.fr-en.{language}"),
            Part("training-parallel-un.tgz", "undoc.2000.fr-en.{language}"),
            Part("training-parallel-nc-v9.tgz", "news-commentary-v9.fr-en.{language}"),
            Part("training-giga-fren.tar", "giga-fren.release2.fixed.{language}.gz"),
        ),
        "valid": (_NEWSTEST_2013_PART,),
        "test": (Part("test-full.tgz", "newstest2014-fren-{role}.{language}.sgm", "segments"),),
    },
    licence=_WMT14_LICENCE,
    citation=_WMT14_CITATION,
    statistics=PublishedStatistics(
        num_pairs=35_482_654,
        # Nobody's count of pieces was found. Of both languages together: as many more than of
        # en-de (60.1) as a pair has more bytes (361.3 against 301.3: Hugging Face, wmt14,
        # dataset_infos.json at 040102f). Shared out as newstest2013's bytes are, 333 kB English
        # and 393 kB French.
        mean_pieces={"en": 33.1, "fr": 39.0},
        source="pairs: fairseq-lua issue 59, of 40.8 million read; lengths: an estimate from the "
        "corpus' bytes, as no count of its pieces is published",
    ),
)

IWSLT14 = ArchivedEntry(
    name="iwslt14",
    languages=("de", "en"),
    folder="iwslt14",
    archives=(_IWSLT_2014,),
    parts={
        "train": (Part("de-en.tgz", "train.tags.de-en.{language}", "talks"),),
        # The 6,750 sentences on which papers report; their validation set is every 23rd pair of
        # the training text, so here too it is held out of that (data.heldout_pairs).
        "test": tuple(
            Part("de-en.tgz", f"IWSLT14.{talks}.de-en.{{language}}.xml", "segments")
            for talks in (
                "TED.dev2010",
                "TEDX.dev2012",
                "TED.tst2010",
                "TED.tst2011",
                "TED.tst2012",
            )
        ),
    },
    licence="TED talks, CC BY-NC-ND 4.0 (https://wit3.fbk.eu)",
    citation="Cettolo et al. 2012; Cettolo et al. 2014 (IWSLT 2014)",
    statistics=PublishedStatistics(
        num_pairs=160_239,
        mean_pieces={"de": 4_035_591 / 160_239, "en": 3_949_114 / 160_239},
        source="fairseq-preprocess of 2021-02-17 after its own prepare-iwslt14.sh (10,000 shared "
        "BPE merges, lower-cased)",
    ),
)

ARCHIVED = {entry.name: entry for entry in (WMT14_EN_DE, WMT14_EN_FR, IWSLT14)}
