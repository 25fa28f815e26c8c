/* Test app in C99: app BUNDLE [selftest|leak]. It classifies one grey image; `leak` does not free the error text. */
#include <evm/evm.h>

#include <stdio.h>
#include <string.h>

static int failed(char *error) {
    fprintf(stderr, "app: %s\n", error ? error : "forgotten");
    evm_free(error);
    return 1;
}

int main(int argc, char **argv) {
    static uint8_t grey[3 * 50 * 70];
    evm_model *model = NULL;
    evm_prediction best[2];
    evm_check checks[32];
    evm_options options = {0};
    evm_image image = {grey, 70, 50, 0};
    char *error = NULL;
    size_t count = 0, i;
    options.size = sizeof options;
    options.threads = 1;
    memset(grey, 128, sizeof grey);
    if (argc < 2) return 2;
    if (evm_open(argv[1], &options, &model, &error)) {
        if (argc > 2 && !strcmp(argv[2], "leak")) error = NULL;
        return failed(error);
    }
    if (evm_classify(model, &image, 1, 2, best, &error)) return failed(error);
    printf("%s %.4f\n", evm_label(model, best[0].index), best[0].score);
    if (argc > 2 && !strcmp(argv[2], "selftest") && evm_selftest(model, checks, 32, &count, &error)) return failed(error);
    for (i = 0; i < count; i++) printf("%s %s\n", checks[i].name, checks[i].error <= checks[i].limit ? "ok" : "FAILED");
    evm_close(model);
    model = NULL;
    return 0;
}
