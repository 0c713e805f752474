#!/usr/bin/env bash
# llamacpp.sh VERSION FOLDER: llama.cpp's converter to GGUF, and a program that tokenizes as llama.cpp does.
# Both from the sdist of llama-cpp-python. Only the sources that read a GGUF's vocabulary are compiled (half a minute).
set -euo pipefail
version=$1 folder=$2
here=$(cd "$(dirname "$0")" && pwd)
rm -rf "$folder"
mkdir -p "$folder/o"
cd "$folder"
python -m pip download -q --no-deps --no-binary llama-cpp-python "llama-cpp-python==$version"
tar -xzf ./*.tar.gz --strip-components 3 --wildcards '*/vendor/llama.cpp/convert_hf_to_gguf.py' \
    '*/vendor/llama.cpp/'{conversion,gguf-py,src,include,ggml}'/*'
printf '#define GGML_VERSION ""\n#define GGML_COMMIT ""\n' > ggml/src/ggml-version.h
flags=(-O1 -D_GNU_SOURCE -I../src -I../include -I../ggml/include -I../ggml/src)
cd o
cc "${flags[@]}" -c ../ggml/src/ggml{,-alloc,-quants}.c
c++ -std=c++17 "${flags[@]}" "$here/llamacpp_tokenize.cpp" ../src/unicode{,-data}.cpp \
    ../src/llama-{vocab,model-loader,arch,impl,mmap,hparams}.cpp ../ggml/src/{ggml,gguf}.cpp \
    ../ggml/src/ggml-{backend,backend-reg,backend-dl,backend-meta,threading}.cpp ./*.o -o ../tokenize -lpthread -ldl
cd ..
rm -rf o src include ggml ./*.tar.gz
