// Token ids by llama.cpp's own code: `tokenize FILE.gguf < texts`, each text ends with a NUL byte.
// Prints the begin token and all tokens at which a generation stops, then the ids of each text, one line each. Names of
// special tokens in a text become those tokens.
#include "llama-arch.h"
#include "llama-model-loader.h"
#include "llama-vocab.h"

#include <iostream>

// The loader calls these for files in several parts, which ours are not. Their source file needs the whole library.
extern "C" int32_t llama_split_path(char *, size_t, const char *, int32_t, int32_t) { return 0; }
extern "C" int32_t llama_split_prefix(char *, size_t, const char *, int32_t, int32_t) { return 0; }

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    std::vector<std::string> splits;
    llama_model_loader loader(nullptr, nullptr, nullptr, argv[1], splits, nullptr, LLAMA_LOAD_MODE_NONE, false, true,
                              false, nullptr, nullptr);
    llama_vocab vocab;
    vocab.load(loader, LLM_KV(loader.get_arch()));
    std::cout << vocab.token_bos();
    for (llama_token id = 0; id < (llama_token) vocab.n_tokens(); id++) {
        if (vocab.is_eog(id)) {
            std::cout << ' ' << id;
        }
    }
    std::cout << '\n';
    for (std::string text; std::getline(std::cin, text, '\0');) {
        for (llama_token id : vocab.tokenize(text, true, true)) {
            std::cout << id << ' ';
        }
        std::cout << '\n';
    }
}
