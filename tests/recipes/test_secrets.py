"""Secrets are found by their form, by their name, and by how random they are; what looks like one is left alone."""

import random
import string
import time

import pytest

from nesso_tune import RecipeError
from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.secrets import find_secrets, is_secret_name, masked, masked_word
from tests.support.runs import recipe, write_recipe

_RNG = random.Random(16)
LETTERS, WORD = string.ascii_letters, string.ascii_letters + string.digits
HEX, CAPITALS, URL = "0123456789abcdef", string.ascii_uppercase + string.digits, WORD + "_-"
BASE58 = "".join(sorted(set(WORD) - set("0OIl")))


def some(count, alphabet=WORD):
    """Random characters: no token of anyone's stands in this file."""
    return "".join(_RNG.choice(alphabet) for _ in range(count))


SECRETS = {
    "Anthropic": f"sk-ant-api03-{some(40)}-{some(40)}AA",
    "OpenAI": f"sk-{some(48)}",
    "OpenAI, a project's": f"sk-proj-{some(30)}_{some(20)}-{some(10)}",
    "OpenAI, a service account's": f"sk-svcacct-{some(60)}",
    "DeepSeek": f"sk-{some(32, HEX)}",
    "OpenRouter": f"sk-or-v1-{some(64, HEX)}",
    "Hugging Face": f"hf_{some(34, LETTERS)}",
    "Hugging Face, an organisation's": f"api_org_{some(34, LETTERS)}",
    "GitHub": f"ghp_{some(36)}",
    "GitHub, an app's": f"ghs_{some(36)}",
    "GitHub, fine-grained": f"github_pat_{some(22)}_{some(59)}",
    "GitLab": f"glpat-{some(20, URL)}",
    "GitLab, a deploy token": f"gldt-{some(20)}",
    "Atlassian": f"ATATT3xFfGF0{some(60)}",
    "Google": f"AIza{some(35, URL)}",
    "Google, OAuth": f"ya29.a0{some(60, URL)}",
    "Google, a client's": f"GOCSPX-{some(28, URL)}",
    "AWS": f"AKIA{some(16, CAPITALS)}",
    "AWS, temporary": f"ASIA{some(16, CAPITALS)}",
    "AWS, the secret one": "wJalr" + some(35),
    "Azure, a storage account's": f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={some(86)}==",
    "Azure, a signature": f"https://a.blob.core.windows.net/c?sv=2022-11-02&sig={some(40)}%3D",
    "Azure, a client's": f"{some(3)}8Q~{some(34)}",
    "npm": f"npm_{some(36)}",
    "PyPI": f"pypi-AgEIcHlwaS5vcmc{some(60)}",
    "Databricks": f"dapi{some(32, HEX)}",
    "Slack": f"xoxb-{some(12, string.digits)}-{some(12, string.digits)}-{some(24)}",
    "Slack, an app's": f"xapp-1-A{some(10, CAPITALS)}-{some(13, string.digits)}-{some(64, HEX)}",
    "Slack, a webhook": f"https://hooks.slack.com/services/T{some(8, CAPITALS)}/B{some(8, CAPITALS)}/{some(24)}",
    "Discord, a webhook": f"https://discord.com/api/webhooks/{some(18, '123456789')}/{some(68, URL)}",
    "Telegram": f"{some(9, '123456789')}:AA{some(33, URL)}",
    "a JSON web token": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{some(43, URL)}",
    "Weights & Biases": f"wandb_v1_{some(77)}",
    "Weights & Biases, named so": f"wandb login --relogin {some(40, HEX)}",
    "Stripe": f"sk_live_{some(24)}",
    "Docker": f"dckr_pat_{some(27)}",
    "Shopify": f"shpat_{some(32, HEX)}",
    "SendGrid": f"SG.{some(22, URL)}.{some(43, URL)}",
    "Groq": f"gsk_{some(52)}",
    "Replicate": f"r8_{some(37)}",
    "NVIDIA": f"nvapi-{some(64, URL)}",
    "xAI": f"xai-{some(80)}",
    "Perplexity": f"pplx-{some(48)}",
    "Fireworks": f"fw_{some(24)}",
    "LangSmith": f"lsv2_pt_{some(32, HEX)}_{some(10, HEX)}",
    "Mistral, without a form": some(32),
    "Cohere, without a form": some(40),
    "DigitalOcean": f"dop_v1_{some(64, HEX)}",
    "Vault": f"hvs.{some(90)}",
    "Grafana": f"glsa_{some(32)}_{some(8, HEX)}",
    "Sentry": f"sntrys_{some(60)}",
    "Postman": f"PMAK-{some(24, HEX)}-{some(34, HEX)}",
    "Tailscale": f"tskey-auth-{some(12)}-{some(32)}",
    "Mailgun": f"key-{some(32, HEX)}",
    "Twilio": f"SK{some(32, HEX)}",
    "Linear": f"lin_api_{some(40)}",
    "Doppler": f"dp.pt.{some(43)}",
    "a private key": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{some(60)}\n-----END OPENSSH PRIVATE KEY-----",
    "a PGP key": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "an age key": f"AGE-SECRET-KEY-1{some(58, CAPITALS)}",
    "user and password": "postgres://me:hunter2@db.host/x",
    "a user alone": f"https://{some(20)}@host.org/x.git",
    "a short user alone": "https://token@host",
    "?token=": f"https://host.org/x?token={some(12)}",
    "&api_key=": "https://host.org/x?a=1&api_key=s3cr3tvalue",
    "a presigned URL": f"https://b.s3.amazonaws.com/k?X-Amz-Signature={some(64, HEX)}",
    "a header": f"Authorization: Bearer {some(30)}",
    "an assignment": "export DB_PASS=hunter2",
    "a quoted assignment": f'WANDB_API_KEY="{some(40, HEX)}"',
    "Anyscale": f"esecret_{some(24)}",
    "Modal, its id": f"ak-{some(22)}",
    "Modal": f"as-{some(22)}",
    "RunPod": f"rpa_{some(40, CAPITALS)}",
    "Lambda": f"secret_{some(40)}",
    "Lambda, with its name": f"secret_my-key_{some(32, HEX)}.{some(32)}",
    "Kaggle": f"KGAT_{some(32, HEX)}",
    "Aiven": f"AVNS_{some(18, URL)}",
    "Vault, an old one": f"s.{some(24)}",
    "Mailgun, a newer one": f"{some(32, HEX)}-{some(8, HEX)}-{some(8, HEX)}",
    "Teams, a webhook": f"https://acme.webhook.office.com/webhookb2/{some(36, HEX)}@{some(36, HEX)}/IncomingWebhook/"
    f"{some(32, HEX)}/{some(36, HEX)}",
    "Azure, the key alone": f"{some(86, WORD + '+')}==",
    "Azure, the key alone, a path by its looks": f"/{some(20)}/{some(20)}/{some(20)}/{some(22)}==",
    "a name in small letters": "password=hunter22",
    "a name in small letters, exported": "export my_token=hunter22",
    "an option": "mysql --password=hunter22 -h db",
    "an option and a word": "mysql --password hunter22 -h db",
    "a name in YAML": "api_key: hunter22abc",
    "curl's user": "curl -s -u me:hunter22 https://host/x",
    "sshpass": "sshpass -p hunter22 ssh host",
    "docker login": "docker login -u me -p hunter22 registry",
    "a .netrc": "machine host login me password hunter22",
    "Kaggle's file": f'{{"username":"x","key":"{some(32, HEX)}"}}',
    "Google's file": f'{{"private_key_id": "{some(40, HEX)}"}}',
    "a recipe's key": "cluster.env.DBPASS=hunter",
    "within a text": f"Use gh with ghp_{some(36)}, please.",
}
HARMLESS = [
    "meta-llama/Llama-3.1-8B-Instruct", "mii-llm/zagreus-0.4B-ita", "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    "TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ-4bit-32g-actorder_True", "mixtral-8x22b-instruct-v0.1.Q4_K_M.gguf",
    "allenai/OLMo-2-0425-1B-SFT-20250101-checkpoint4000", some(40, HEX), some(32, HEX), some(64, HEX),
    "550e8400-e29b-41d4-a716-446655440000", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", f"sha256:{some(64, HEX)}",
    "hf_transfer_enabled_by_default", "hf_hub_download_of_a_whole_data_set", "sk-learn-contrib-and-more-words",
    "sk-some-words-that-are-long-enough", "npm_config_registry_of_my_company", "pypi-server-in-the-basement",
    "dapi_of_something", "data-api-v2", "glpat-of-course", "ghp_template", "AIzawa", "SG.2", "xapp-store",
    "wandb_version_0_17", "sk_test_ing", "eyJustWords.eyJmore", "pat-na1-something", "key-value-store",
    "https://huggingface.co/datasets/x/y/resolve/main/a.jsonl?download=true", "https://host:8080/path@v1/x",
    "https://medium.com/@someone/an-article", "git@github.com:org/repo.git", "ssh://git@github.com/org/repo",
    "https://git@github.com/org/repo", "hf://datasets/org/name@main/x.jsonl", "s3://bucket/some/key/x.jsonl",
    "https://h.org/x?token_limit=1000000", "https://h.org/x?tokenizer=llama3-tokenizer", "https://u:${TOKEN}@host/x",
    "https://h.org/x?token=$TOKEN", "https://h.org/x?api_key={api_key}", "export HF_TOKEN=$MY_TOKEN",
    "PATH=/opt/bin:/usr/bin", "TOKENIZERS_PARALLELISM=false", "MAX_TOKEN_LENGTH=4096",
    "SSH_AUTH_SOCK=/tmp/ssh-abc/agent.1", f"data/{some(32, HEX)}.jsonl", f"shards/{some(44)}.jsonl",
    "Sei un assistente che risponde in italiano, con frasi brevi.", "{{ token }}", "<|im_start|>",
    "Your password is never asked for; the token is secret.", "Bearer of good news everyone", "basic understanding",
    "LlamaForCausalLM", "LlamaLikeForCausalLMWithValueHeadV2", "module load cuda/12.1 nccl/2.18.3-cuda12.1",
    "source /leonardo/prod/opt/modulefiles/profile/init.sh", "outputs/run-2024-05-11T10-22-33Z-seed42-lr5e4",
    "abcdefghijklmnopqrstuvwxyz0123456789", "a" * 60,
    f"Qm{some(44, BASE58)}", f"bafybei{some(52, 'abcdefghijklmnopqrstuvwxyz234567')}", f"sha512-{some(86)}==",
    "KEY=abcde", "KEY=VALUE", "HF_TOKEN=hf_xxxxxxxx", "HF_TOKEN=your-token", "API_KEY=abcde", "export HF_TOKEN=<token>",
    "La password: scegline una lunga.", "Scegli una password sicura, di 8 caratteri.", "password=<password>",
    "password=$PASSWORD", "password=********", "token: xxxxxxxx", "api_key=your-token-1", "api_key: my-api-key",
    "--password=${PASSWORD}", "sshpass -p $PASSWORD ssh host", "curl -u user:$PASSWORD https://host/x",
    "curl -u user https://host:8080/x", "max_new_tokens=4096", "eos_token: <|reserved_200|>", "sorted(x, key=str2int)",
    "tokenizer(text, max_tokens=n2_tokens)", "api_key=os.environ['KEY1']", "password=getpass('Password 1')",
    "key: Llama-3.1-8B-Instruct", "--ssh-key id_ed25519", "Il token: un pezzo di parola.",
    "primary_key=customer_id_2024",
    "per_token_loss = -soft_coef_1", "OPENAI_API_KEY=sk-...,", "(`--secrets SECRET=value`)",
    "secret_santa_2024_for_everyone", "esecret_word", "ak-47", "as-is",
    "s.abcdefghijklmnopqrstuvwx", "rpa_robotic",
]  # fmt: skip


NAMES = [
    "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "db_password", "MY_APIKEY", "DB_PASS",
    "GITHUB_PAT", "MY_AUTH", "HFTOKEN", "PGPASSWORD", "MYSQL_PWD", "SMTP_CREDS", "SLACK_BOT_TOKEN", "OPENAIAPIKEY",
    "MYSECRET", "DBPASS", "SSHPASS", "HF_TOKEN1", "WANDBKEY", "MYPASS", "MYPAT", "TOKEN1", "KEY2", "MYKEY",
    "ENCRYPTIONKEY", "S3_SK", "X_API_KEYS", "SIGNATURE", "TOKEN_2", "apiKey", "DBPWD", "ROOTPASS2",
    "GH_PAT_1", "OSS_SK", "KEY",
]  # fmt: skip
OTHER_NAMES = [
    "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "MONKEY", "KEYS_FILE_FORMAT", "PWD", "OLDPWD", "SSH_AUTH_SOCK",
    "HF_TOKEN_PATH", "XAUTHORITY", "GIT_AUTHOR_NAME", "COMPASS", "BYPASS", "PATH", "PYTHONPATH", "KEYBOARD",
    "AWS_SHARED_CREDENTIALS_FILE", "MAX_TOKEN_LENGTH", "PATIENCE", "PASSTHROUGH", "TOKEN_LIMIT", "AUTH_METHOD",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN_CACHE", "MAX_TOKENS", "VLLM_MAX_TOKENS", "NUM_TOKENS", "PAD_TOKEN", "EOS_TOKEN",
    "BOS_TOKEN", "NCCL_AUTH", "CPU_PIN", "PASS_THROUGH", "SORT_KEY", "PRIMARY_KEY", "TOKENS_PER_STEP", "MAX_NEW_TOKENS",
    "VLLM_MAX_NUM_BATCHED_TOKENS", "TRESPASS", "DONKEY", "TURKEY", "HOTKEY", "HOTKEYS", "SORTKEY", "PUBLIC_KEY",
    "COMPAT", "TASK", "DISK", "SK", "FOREIGN_KEYS", "PASS_AT_1", "PIN_MEMORY", "", "_", "1",
]  # fmt: skip


def test_every_secret_is_found_and_masked():
    assert len(SECRETS) >= 40
    for name, secret in SECRETS.items():
        assert list(find_secrets({"cluster": {"env": {"X": ["y", secret]}}})), name
        shown = masked(f"--set cluster.env.X={secret}")
        assert "…" in shown, name
        assert secret not in shown, name
        assert not list(find_secrets(shown)), f"{name}: {shown}"


def test_what_only_looks_like_one_is_left_alone():
    assert len(HARMLESS) >= 40
    found = [text for text in HARMLESS if list(find_secrets({"cluster": {"env": {"X": text}}})) or masked(text) != text]
    assert found == []


def test_hashes_and_names_may_be_random_where_they_are_expected():
    """A file's name, a data set's id, a value of a column: random, and no secret; a form is one everywhere."""
    for key in ("path", "revision", "base", "tools_file"):
        assert not list(find_secrets({key: some(40)}))
    assert not list(find_secrets({"where": {"id": [some(40)]}}))
    assert list(find_secrets({"path": f"hf_{some(34, LETTERS)}"}))


def test_names_of_variables_that_hold_a_secret():
    for name in NAMES:
        assert is_secret_name(name), name
        assert not is_secret_name(name, "/run/secrets/it"), "the path of one is none"
        assert masked_word(f"sft:cluster.env.{name}=a1") == f"sft:cluster.env.{name}=…"


def test_names_of_variables_that_hold_none():
    assert [name for name in OTHER_NAMES if is_secret_name(name)] == []
    assert not is_secret_name("MY_AUTH", "true")
    assert not is_secret_name("PROMPT_TOKENS", "4096")
    assert not is_secret_name("TOKEN_WEIGHT", "0.5")
    assert all(is_secret_name(name, "4096") for name in ("SIM_PIN", "OTP", "DBPASS", "DB_PASSWORD"))


@pytest.mark.parametrize(
    "word",
    ["--set=cluster.env.X_TOKEN=hunter2", "cluster.env={DB_PASS: hunter2}", '{"HF_TOKEN":"hunter2"}',
     "--set=cluster={env: {A: b, 'MYKEY' : 'a, hunter2'}}", "cluster.env.DB_PASS= a hunter2", r'{\"KEY\":\"hunter2\"}',
     "train.max_tokens=1,cluster.env.KEY2=hunter2"],
)  # fmt: skip
def test_every_name_in_a_word_of_the_command_is_asked(word):
    assert "hunter2" not in masked_word(word)
    assert masked_word(word).endswith("…")


@pytest.mark.parametrize(
    "word",
    [
        "train.max_tokens=4096",
        "evaluation.new_tokens=64",
        "--set=data.sort_key=x",
        "{eos_token: </s>}",
        "a=b=c",
        "TOKEN=",
    ],
)
def test_other_words_of_the_command_are_shown(word):
    assert masked_word(word) == word


@pytest.mark.parametrize("part", ["a=", "KEY=", "token: ", "--password ", "a-", "curl -u ", "s.", "TOKENS_", "A1",
                                  "passwd ", "/a", "KEY", "secret_", "docker login ", "x_here"])  # fmt: skip
def test_long_texts_take_no_long_time(part):
    began = time.process_time()
    text = part * (40_000 // len(part))
    masked(text), masked_word(text), is_secret_name(text)
    assert time.process_time() - began < 15, "of this process's own time, a second on any machine"


def test_a_recipe_refuses_both_and_repeats_neither(tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    for key, value in {
        "cluster.env.DB_PASS": "hunter2", "cluster.env.X": SECRETS["a JSON web token"],
        "model.base": SECRETS["a user alone"], "chat.default_system": f"Usa {SECRETS['Mistral, without a form']}.",
        "data.sources.0.alias": SECRETS["Groq"],
    }.items():  # fmt: skip
        with pytest.raises(RecipeError) as refused:
            load_recipe(path, {key: value})
        assert "secret" in str(refused.value), key
        assert str(value) not in str(refused.value), key
