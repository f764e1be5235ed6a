"""Detects and masks secrets: recipes and run files are recorded, shared and published.

There are three criteria: the issuer's token format, the context (`DB_PASS=…`, `?token=…`, `https://token@host`), and
randomness, for tokens without a fixed format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from nesso_tune.recipes.yaml_source import KeyPath

MASK = "…"
# Issuer: token format. A group `(?P<secret>…)` limits what is masked. Look-aheads for capitals and digits exclude words
# with the same prefix (`hf_some_words`, `sk-learn`).
_MIXED = r"(?=[\w-]{0,99}[A-Z0-9])"
TOKEN_PATTERNS = {
    "of Anthropic": r"(?<![\w/-])sk-ant-[\w-]{10,}",
    "of OpenRouter": r"(?<![\w/-])sk-or-v\d-[\w-]{16,}",
    "of an API": rf"(?<![\w/-])sk-(?:(?:proj|svcacct|admin|None|[a-z0-9]{{2,8}})-){{0,2}}{_MIXED}[\w-]{{16,}}"
                r"(?<!-)(?<=\w\w\w\w\w\w\w\w)",
    "of the Hugging Face hub": r"\b(?:hf_|api_org_)(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{20,}",
    "of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    "of GitLab": r"\bgl(?:pat|dt|rt|rtr|cbt|ptt|ft|soat|agent|oas|imt|ffct)-(?=[\w.-]*[A-Z0-9])[\w.-]{10,}",
    "of Bitbucket or Atlassian": r"\bAT(?:ATT|BB|CTT)[A-Za-z0-9][\w=-]{20,}",
    "of Google": r"\bAIza[\w-]{30,}|\bya29\.[\w-]{10,}|\bGOCSPX-[\w-]{20,}|\b1//0[\w-]{30,}",
    "of AWS": r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b|\bABSK[A-Za-z0-9+/]{60,}",
    "of Azure": r"(?i:AccountKey|SharedAccessKey|SharedAccessSignature)=(?P<secret>[^\s;\"'${<]{16,})"
                r"|\b[\w~.]{3}\dQ~[\w~.-]{31,}"
                # Key of a storage account; excludes package digests (`sha512-…`), which have the same length.
                r"|(?<![A-Za-z0-9+/])(?<!sha512[-:])[A-Za-z0-9+/]{86}==(?![\w=])",
    "of npm": r"\bnpm_(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}",
    "of PyPI": r"\bpypi-(?=[\w-]{0,99}[A-Z])[\w-]{16,}",
    "of Databricks": r"\bdapi(?=[0-9a-f]*\d)[0-9a-f]{32}(?:-\d)?\b",
    "of Slack": r"\bxox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{10,}|\bxapp-[\w-]{10,}"
                r"|hooks\.slack\.com/(?:services|workflows|triggers)/(?P<secret>[\w/]{20,})",
    "of Discord": r"discord(?:app)?\.com/api/webhooks/(?P<secret>\d{15,}/[\w-]{20,})"
                  r"|\b[MNO][A-Za-z\d]{23,}\.[\w-]{6}\.[\w-]{27,}",
    "of Telegram": r"\b\d{8,10}:AA[\w-]{30,}",
    "of Weights & Biases": r"\bwandb_v\d_\w{16,}|\bwandb\s+login\s+(?:--\S+\s+)*(?P<secret>[0-9a-f]{40})\b",
    "of Stripe": r"\b(?:sk|rk)_(?:live|test|prod)_[A-Za-z0-9]{10,}|\bwhsec_[A-Za-z0-9+/]{20,}",
    "of Docker": r"\bdckr_(?:pat|oat)_[\w-]{20,}",
    "of Shopify": r"\bshp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}",
    "of SendGrid": r"\bSG\.[\w-]{16,}\.[\w-]{16,}",
    "of Groq": r"\bgsk_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{20,}",
    "of Replicate": r"\br8_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{30,}",
    "of NVIDIA": r"\bnvapi-[\w-]{20,}",
    "of xAI, Perplexity or Tavily": r"\b(?:xai|pplx|tvly)-(?:dev-|prod-)?(?=[\w-]{0,99}[A-Z0-9])[\w-]{20,}",
    "of Fireworks or Together": r"\bfw_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{20,}|\btgp_v\d_[\w-]{20,}",
    "of LangSmith": r"\blsv2_(?:pt|sk)_[0-9a-f]{20,}\w*",
    "of Pinecone": r"\bpcsk_\w{20,}",
    "of DigitalOcean": r"\bdo[opr]_v1_[0-9a-f]{32,}",
    "of HashiCorp": r"\bhv[sbr]\.[\w-]{20,}|\b[A-Za-z0-9]{14}\.atlasv1\.[\w-]{40,}"
                    r"|(?<![\w.])[sb]\.(?=[A-Za-z]*\d)[A-Za-z0-9]{24}(?![\w(])",
    "of Grafana": r"\bgl(?:sa|c)_[\w+/=]{20,}",
    "of New Relic": r"\bNRA[KL]-[A-Z0-9]{20,}|\bNRJS-[0-9a-f]{16,}",
    "of Sentry": r"\bsntry[su]_[\w+/=]{20,}",
    "of Postman": r"\bPMAK-[0-9a-f]{20,}-[0-9a-f]{20,}",
    "of PlanetScale or Supabase": r"\bpscale_(?:tkn|pw|oauth)_[\w.=-]{20,}|\bsbp_[0-9a-f]{32,}|\bsb_secret_[\w-]{20,}",
    "of Linear, Notion or Figma": r"\blin_(?:api|oauth)_[A-Za-z0-9]{20,}|\bntn_[A-Za-z0-9]{30,}|\bfig[dor]_[\w-]{30,}",
    "of Airtable": r"\bpat[A-Za-z0-9]{14}\.[0-9a-f]{40,}",
    "of HubSpot": r"\bpat-(?:na|eu|ap)\d-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "of Mailgun or Mailchimp": r"\bkey-[0-9a-f]{32}\b|\b[0-9a-f]{32}-us\d{1,2}\b|\bxkeysib-[0-9a-f]{40,}"
                              r"|(?<![\w-])[0-9a-f]{32}-[0-9a-f]{8}-[0-9a-f]{8}(?![\w-])",
    "of Twilio": r"\bSK[0-9a-f]{32}\b",
    "of Square": r"\bsq0(?:atp|csp)-[\w-]{20,}|\bEAAA[\w-]{50,}",
    "of Facebook": r"\bEAA[CG][A-Za-z0-9]{50,}",
    "of Tailscale": r"\btskey-[a-z]+-[A-Za-z0-9]{8,}-?[A-Za-z0-9]*",
    "of Doppler or 1Password": r"\bdp\.(?:pt|st|ct|sa|scim|audit)\.[\w.-]{20,}|\bops_eyJ[\w-]{40,}",
    "of a build service": r"\bCCIPAT_[A-Za-z0-9]{10,}_[0-9a-f]{20,}|\bbk[uc]a_[0-9a-f]{20,}|\bpul-[0-9a-f]{40}\b"
                          r"|\bpnu_[A-Za-z0-9]{30,}|\bdt0c01\.[A-Z0-9]{20,}\.[A-Z0-9]{40,}|\brubygems_[0-9a-f]{40,}"
                          r"|\bHRKU-[\w-]{30,}|\bnfp_[A-Za-z0-9]{30,}|\bsgp_[\w-]{30,}|\bFlyV1\s+fm\d_\S{20,}",
    "of Anyscale, RunPod or Kaggle": r"\besecret_[A-Za-z0-9]{16,}|\brpa_(?=[A-Za-z0-9]*\d)[A-Za-z0-9]{36,}"
                                     r"|\bKGAT_[0-9a-f]{32}\b",
    "of Modal": r"(?<![\w/-])a[ks]-(?=[a-z0-9]*[A-Z]|[A-Za-z]*\d)[A-Za-z0-9]{22}(?![\w-])",
    "of Lambda": r"\bsecret_(?:[A-Za-z0-9-]{1,40}_)?(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}(?:\.[A-Za-z0-9]{20,})?",
    "of Aiven": r"\bAVNS_(?=[\w-]{0,30}[a-z])[\w-]{15,}",
    "of Teams": r"(?:webhook\.office\.com/webhookb2|outlook\.office\.com/webhook)/(?P<secret>[^\s\"'<>]{20,})",
    "of ElevenLabs": r"\bsk_[0-9a-f]{40,}",
    "a JSON web token": r"\beyJ[\w-]{8,999}\.eyJ[\w-]{8,}(?:\.[\w-]*)?",
    "a private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?:[^-]+-----END [A-Z0-9 ]*-----)?"
                     r"|\bAGE-SECRET-KEY-1[0-9A-Z]{20,}|\bPuTTY-User-Key-File-\d",
}  # fmt: skip
# Secrets by context. References (`$TOKEN`, `{token}`, `<token>`) are not secrets.
_KEYS = (
    "token|access[-_]?token|auth[-_]?token|refresh[-_]?token|id[-_]?token|private[-_]?token|job[-_]?token|bearer"
    "|api[-_]?key|apikey|access[-_]?key|secret[-_]?key|account[-_]?key|secret|client[-_]?secret|password|passwd|pass|pwd"
    "|x-amz-signature|x-amz-security-token|x-goog-signature|signature|sig|credentials?"
)
_PLAIN_USERS = "git|hg|svn|user|username|anonymous|guest|me|nobody"
CONTEXT_PATTERNS = {
    "in a URL": r"\w://[^/\s:@?#]*:(?P<secret>(?![${<…])[^/\s@]+)@"
                rf"|\bhttps?://(?P<user>(?!(?:{_PLAIN_USERS})@)(?![${{<…])[^/\s:@?#]+)@"
                rf"|(?i:[?&#](?:{_KEYS}))=(?P<parameter>(?![${{<…])[^&\s#\"'$]{{6,}})"
                r"|[?&]key=(?P<key>(?=[^&\s]*\d)[^&\s#\"'${<…]{16,})",
    "in a header": r"(?i:\bauthorization\s*[:=]\s*[\"']?(?:\w+\s+)?)(?P<secret>(?![${<…])[^\s\"'$]{8,})"
                   r"|\b(?:Bearer|Basic)\s+(?P<bearer>(?=\S*[A-Z0-9])[\w+/.~-]{16,}={0,2})",
    "in a command": r"\bcurl\s(?:[^\n|;]{0,300}\s)?(?:-u|--user)[ =]?[\"']?[^\s:\"'/]{1,100}:"
                    r"(?P<secret>(?![${<…*])[^\s\"']{4,})"
                    r"|\bsshpass\s+-p\s?[\"']?(?P<password>(?![${<…*])[^\s\"']{4,})"
                    r"|\b(?:docker|podman)\s+login\s(?:[^\n|;]{0,300}\s)?-p\s?[\"']?(?P<p>(?![${<…*])[^\s\"']{4,})",
}  # fmt: skip
PATTERNS = {kind: re.compile(form) for kind, form in {**TOKEN_PATTERNS, **CONTEXT_PATTERNS}.items()}
# Values of names: in shell, `KEY=value`, YAML and JSON (assignment); in options and .netrc (option).
ASSIGNMENT_PATTERN = re.compile(
    r"(?<![\w$])(?P<name>[A-Za-z][\w-]{0,60})(?P<sign>[\"']?[ \t]{0,3}[:=][ \t]{0,3})"
    r"(?=[\"']?(?P<secret>[^\s\"'$;&|]{4,999}))"  # look-ahead: the value can itself be a name
)
OPTION_PATTERN = re.compile(
    r"(?:(?<![\w-])--(?P<name>[A-Za-z][\w-]{0,60})|\b(?P<netrc>passw(?:or)?d))[ \t]{1,3}"
    r"[\"']?(?P<secret>[^\s\"'$;&|]{7,})"
)
_NAMED_IN_WORD = re.compile(r"(?<![\w-])-{0,2}(?P<name>[A-Za-z_][\w-]{0,99})[\\\"']{0,4}\s{0,9}[:=]\s{0,9}")
_LETTER_AND_DIGIT = re.compile(r"(?=[^a-zA-Z]*[a-zA-Z])(?=\D*\d)[^()\[\]{}<>,`]+")
# Placeholders in examples.
_PLACEHOLDER = re.compile(
    r"[<{\[(%$].*|.*(?:…|\.{3}).*|(?:\w{1,8}[-_])?[x*.•_-]+|abc(?:d(?:ef?)?)?(?:123)?|.*[-_]here"
    r"|(?:your|insert|enter|replace|example|placeholder|redacted|hidden|masked|dummy|change[-_]?me|inserisci)[\w-]*"
    r"|(?:my|the|some|an?|il|la)[-_][a-z_-]+|values?|valore|secret|token|password|key|todo|tbd|string",
    re.IGNORECASE,
)
RANDOM, ASSIGNMENT = "(long random text)", "(by the name of the variable)"
WINDOW_CHARS, OVERLAP_CHARS = 8_000, 1_000  # bounds the cost of the patterns on long texts

# Words in variable names: ENDINGS denote a secret, also as a suffix (`DBPASS`); WORDS only as a whole word;
# NON_SECRET_WORDS share a suffix only; NON_SECRET_QUALIFIERS before a word change its meaning (`MAX_TOKENS`,
# `SORT_KEY`), as do NON_SECRET_LAST_WORDS at the end.
PASSWORDS = ("PASSWORDS", "PASSWORD", "PASSWD", "PASSPHRASE", "PASSCODE", "PASS", "PWD")
ENDINGS = (*PASSWORDS, "TOKENS", "TOKEN", "SECRETS", "SECRET", "KEYS", "KEY", "CREDENTIALS", "CREDENTIAL", "CREDS",
           "PAT", "JWT")  # fmt: skip
WORDS = (*ENDINGS, "CRED", "AUTH", "BEARER", "COOKIE", "OTP", "PIN", "SIGNATURE", "SK")
_WORD = re.compile(rf"(?P<before>.*?)(?P<noun>{'|'.join(ENDINGS)})|(?P<whole>{'|'.join(WORDS)})")
LAST_WORD_ONLY = frozenset({"PWD", "SK"})  # and not alone: PWD is the working directory
NON_SECRET_WORDS = frozenset({
    "BYPASS", "COMPASS", "ENCOMPASS", "TRESPASS", "OVERPASS", "UNDERPASS", "SURPASS", "LOWPASS", "HIGHPASS", "BANDPASS",
    "MONKEY", "DONKEY", "TURKEY", "WHISKEY", "JOCKEY", "DISCJOCKEY", "HOCKEY", "MICKEY", "MALARKEY", "LACKEY", "JOKEY",
    "SMOKEY", "COMPAT", "EXPAT", "SPAT", "OLDPWD",
})  # fmt: skip
_TOKEN_QUALIFIERS = frozenset({"MAX", "MIN", "NUM", "N", "TOTAL", "PAD", "EOS", "BOS", "UNK", "SEP", "CLS", "MASK",
                        "EOT", "EOD", "EOM", "SPECIAL", "STOP", "EXTRA", "ADDED", "BATCHED", "IMAGE",
                        "FIM"})  # fmt: skip
_KEY_QUALIFIERS = frozenset({"SORT", "PRIMARY", "FOREIGN", "PARTITION", "SHARD", "GROUP", "CACHE", "INDEX", "JOIN",
                      "HASH", "DICT", "MAP", "LOOKUP", "OBJECT", "COLUMN", "METRIC", "TEXT", "PROMPT", "IMAGE",
                      "PUBLIC", "PUB", "HOT", "PUBLISHABLE", "UNIQUE", "ROUTING", "NUM", "MAX", "STATE"})  # fmt: skip
_PASS_QUALIFIERS = frozenset({"FORWARD", "BACKWARD", "SINGLE", "MULTI", "FIRST", "SECOND", "ONE", "TWO", "NUM", "MAX"})
NON_SECRET_QUALIFIERS = {
    "TOKEN": _TOKEN_QUALIFIERS, "TOKENS": _TOKEN_QUALIFIERS | {"NEW", "PROMPT", "INPUT", "OUTPUT"},
    "KEY": _KEY_QUALIFIERS, "KEYS": _KEY_QUALIFIERS, "PASS": _PASS_QUALIFIERS,
    "PIN": frozenset({"CPU", "GPU", "CORE", "THREAD", "NUMA", "MEMORY", "OMP"}),
    "AUTH": frozenset({"NCCL", "USE", "ENABLE", "DISABLE", "REQUIRE", "NO", "SKIP"}),
    "SK": frozenset({"LANG", "LANGUAGE", "LOCALE", "WIKI"}),  # Slovak
}  # fmt: skip
NON_SECRET_LAST_WORDS = frozenset({
    "FILE", "FILES", "FILENAME", "PATH", "DIR", "DIRECTORY", "FOLDER", "SOCK", "SOCKET", "URL", "URI", "HOST", "PORT",
    "TYPE", "METHOD", "MODE", "NAME", "LIMIT", "LENGTH", "LEN", "SIZE", "COUNT", "TIMEOUT", "TTL", "FORMAT", "ENABLED",
    "DISABLED", "VERSION", "ALGORITHM", "REGION", "PROVIDER", "ENDPOINT", "REQUIRED", "CACHE", "PARALLELISM", "HELPER",
    "THREADS", "COLUMN", "FIELD", "EXPIRY", "LEVEL", "THROUGH", "STEP", "STEPS", "BATCH", "RATE", "RATIO", "BUDGET",
    "MEMORY", "CPU", "CORES", "AT", "K", "LOSS", "LOSSES", "MASK", "IDS", "EMBEDDINGS", "WEIGHT",
})  # fmt: skip
FLAG_VALUES = frozenset({"", "0", "1", "true", "false", "yes", "no", "on", "off", "none", "null", "auto", "basic"})

# Recipe keys with values that can look random: hashes, names of files and data sets, values of the data.
MAY_BE_RANDOM = frozenset({"revision", "path", "base", "files", "reads", "tools_file", "format", "template", "subset",
                           "split", "output_dir", "python", "where", "labels", "roles", "alias"})  # fmt: skip
_STRETCH = re.compile(r"[\w+/.~%-]{20,}={0,2}")
_PIECE = re.compile(r"[A-Za-z0-9]{20,}")
_CHUNK = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_CONTENT_ID = re.compile(r"Qm[1-9A-HJ-NP-Za-km-z]{44}|baf[a-z2-7]{50,}")  # IPFS hash
DIGEST_PREFIXES = ("sha256-", "sha384-", "sha512-")  # package digests in base64
_NUMBER = re.compile(r"[+-]?[\d._]{1,9}(?:[eE][+-]?\d{1,3})?")


def secret_kind(text: str) -> str | None:
    """Kind of the first secret in a text, by format or context (not by randomness); None if there is none."""
    return next((kind for kind, _ in _pattern_spans(text)), None)


def masked(text: str) -> str:
    """Masks all secrets in a text."""
    return _hide_spans(text, [*(span for _, span in _pattern_spans(text)), *_random_spans(text)])


def masked_word(word: str) -> str:
    """Masks secrets in a word of a command line, including the value of a name that denotes a secret.

    Everything after such a name is masked: its value can contain any delimiter.
    """
    for found in _NAMED_IN_WORD.finditer(word):
        if is_secret_name(found["name"]):
            return f"{masked(word[: found.end()])}{MASK}" if found.end() < len(word) else masked(word)
    return masked(word)


def is_secret_name(variable: str, value: str = "unknown") -> bool:
    """Whether the name of an environment variable denotes a secret: `HF_TOKEN`, not `TOKENIZERS_PARALLELISM`.

    The value, if given, can rule this out: it is a path, a number or a flag.
    """
    value = value.strip()
    if value.lower() in FLAG_VALUES or _is_path(value):
        return False
    nouns = {noun for _, noun in _secret_words(variable)}
    return bool(nouns) and not (_NUMBER.fullmatch(value) and nouns.isdisjoint((*PASSWORDS, "PIN", "OTP", "SECRET")))


def _secret_words(variable: str) -> list[tuple[str, str]]:
    """Words of a variable name that denote a secret, each as (preceding word, word)."""
    words = [word for part in re.split(r"[\W_]+", variable.upper()) if (word := part.rstrip("0123456789"))]
    if not words or words[-1] in NON_SECRET_LAST_WORDS or "PER" in words:  # TOKENS_PER_STEP
        return []
    counted = not _TOKEN_QUALIFIERS.isdisjoint(words)  # MAX_NEW_TOKENS
    nouns = []
    for i, word in enumerate(words):
        found = _WORD.fullmatch(word)
        if not found or word in NON_SECRET_WORDS:
            continue
        noun = found["noun"] or found["whole"]
        before = found["before"] or (words[i - 1] if i else "")
        if noun in LAST_WORD_ONLY and (i < len(words) - 1 or not before):
            continue
        of_other = before in NON_SECRET_QUALIFIERS.get(noun, ()) or (noun == "TOKENS" and counted)
        if not of_other:
            nouns.append((before, noun))
    return nouns


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~/", "./", "../"))


def find_secrets(raw: Any, here: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Paths and kinds of secrets in the strings and keys of nested data."""
    if isinstance(raw, str):
        kind = secret_kind(raw)
        if kind is None and MAY_BE_RANDOM.isdisjoint(map(str, here)) and any(True for _ in _random_spans(raw)):
            kind = RANDOM
        if kind:
            yield here, kind
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            if isinstance(key, str) and (kind := secret_kind(key)):
                yield here, kind
            yield from find_secrets(value, (*here, key))
    elif isinstance(raw, (list, tuple)):
        for i, value in enumerate(raw):
            yield from find_secrets(value, (*here, i))


def _pattern_spans(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Secrets found by format or context: the kind and the span to mask."""
    for start in range(0, max(1, len(text)), WINDOW_CHARS):
        window = text[start : start + WINDOW_CHARS + OVERLAP_CHARS]
        for kind, form in PATTERNS.items():
            for found in form.finditer(window):
                named = next((name for name, part in found.groupdict().items() if part), 0)
                yield kind, (start + found.start(named), start + found.end(named))
        for found in (*ASSIGNMENT_PATTERN.finditer(window), *OPTION_PATTERN.finditer(window)):
            if _is_assigned(**found.groupdict()):
                yield ASSIGNMENT, (start + found.start("secret"), start + found.end("secret"))


def _is_assigned(name: str | None, secret: str, sign: str = " ", netrc: str | None = None) -> bool:
    """Whether the value of a name is a secret and not an example, code or prose.

    `DB_PASS=anything` is a secret. Otherwise the value must look like a secret; the test is stricter for vague names.
    """
    name, value = name or netrc or "", secret.rstrip(",)}]`")
    if not is_secret_name(name, value) or _PLACEHOLDER.fullmatch(value):
        return False
    before, noun = _secret_words(name)[0]
    if sign == "=" and name != name.lower() and (before or noun in PASSWORDS or noun.startswith("SECRET")):
        return True
    if noun in ("KEY", "KEYS", "PAT", "SK") and before not in ("API", "ACCESS", "SECRET", "ACCOUNT", "AUTH"):
        return len(value) >= 20 and bool(re.fullmatch(r"(?=[A-Za-z]*\d)[\w+/]+={0,2}", value))
    return len(value) >= 7 and bool(_LETTER_AND_DIGIT.fullmatch(value.rstrip(".")))


def _random_spans(text: str) -> Iterator[tuple[int, int]]:
    """Spans of random text: long, with frequent changes between upper case, lower case and digits.

    Hexadecimal text (hashes, UUIDs), paths and file names are excluded.
    """
    for stretch in _STRETCH.finditer(text):
        word = stretch[0].rstrip(".%")  # a full stop is not a file extension
        is_name = (
            word.startswith(("/", *DIGEST_PREFIXES)) or word.count("/") > 2 or not {".", "~", "%"}.isdisjoint(word)
        )
        if not is_name and any(map(_is_random, _PIECE.findall(word))):
            yield stretch.span()


def _is_random(piece: str) -> bool:
    """Random text changes between upper case, lower case and digits about every second character; names rarely do."""
    chunks = len(_CHUNK.findall(piece))
    kinds = [any(map(is_kind, piece)) for is_kind in (str.isupper, str.islower, str.isdigit)]
    if _HEX.fullmatch(piece) or _CONTENT_ID.fullmatch(piece) or sum(kinds) < 2 or not kinds[2]:
        return False
    if all(kinds):
        return len(piece) / chunks <= 2.5
    return len(piece) >= 28 and len(piece) / chunks <= 3.0  # one case and digits


def _hide_spans(text: str, spans: list[tuple[int, int]]) -> str:
    """Replaces spans, which can overlap, with `MASK`."""
    merged: list[list[int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    borders = [0, *(border for span in merged for border in span), len(text)]
    return MASK.join(text[a:b] for a, b in list(pairwise(borders))[::2])
