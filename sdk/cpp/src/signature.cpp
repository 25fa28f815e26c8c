#include "signature.h"
#include "platform.h"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <memory>
#include <set>
#include <system_error>

#ifdef EVM_SIGNATURES
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#endif

namespace evm {
namespace {

constexpr const char *SIGNED_FILE = "manifest.json", *SIGNATURE = "manifest.json.sig";

#ifdef EVM_SIGNATURES
constexpr std::size_t MAX_KEY = 1 << 16;  // largest size of a key file in bytes
constexpr std::size_t SIGNATURE_SIZE = 64;
constexpr const char *KEY_HINT = "create it from the private key:  openssl pkey -in key.pem -pubout -out public.pem";

template <class T>
using Freed = std::unique_ptr<T, void (*)(T *)>;

// Read an ed25519 public key from a PEM file. Throws UsageError.
Freed<EVP_PKEY> public_key(const std::filesystem::path &path) {
    std::error_code ignored;
    errno = std::filesystem::is_directory(path, ignored) ? EISDIR : 0;
    std::ifstream stream(path, std::ios::binary);
    std::string text(MAX_KEY, '\0');
    if (!errno && stream) stream.read(text.data(), static_cast<std::streamsize>(text.size()));
    if (errno || stream.bad() || !stream.is_open())
        throw UsageError("key " + utf8(path) + " cannot be read: " + std::generic_category().message(errno ? errno : EIO), KEY_HINT);
    const Freed<BIO> bio(BIO_new_mem_buf(text.data(), static_cast<int>(stream.gcount())), BIO_free_all);
    Freed<EVP_PKEY> key(bio ? PEM_read_bio_PUBKEY(bio.get(), nullptr, nullptr, nullptr) : nullptr, EVP_PKEY_free);
    ERR_clear_error();
    if (!key) throw UsageError(utf8(path) + " is not a PEM file of an ed25519 public key", KEY_HINT);
    if (EVP_PKEY_id(key.get()) != EVP_PKEY_ED25519) throw UsageError("key " + utf8(path) + " is not an ed25519 key", KEY_HINT);
    return key;
}

bool verified(EVP_PKEY *key, const std::string &signature, const std::string &message) {
    const Freed<EVP_MD_CTX> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    const auto bytes = [](const std::string &text) { return reinterpret_cast<const unsigned char *>(text.data()); };
    const bool good = context && EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key) == 1 &&
                      EVP_DigestVerify(context.get(), bytes(signature), signature.size(), bytes(message), message.size()) == 1;
    ERR_clear_error();
    return good;
}
#endif

}  // namespace

#ifdef EVM_SIGNATURES
void check_signature(const Source &source, const std::string &manifest, const std::filesystem::path &key) {
    const Freed<EVP_PKEY> known = public_key(key);
    std::string signature;
    try {
        source.read(SIGNATURE, [&](const char *data, std::size_t size) { signature.append(data, std::min(size, SIGNATURE_SIZE + 1 - signature.size())); });
    } catch (const ReadError &error) {
        if (error.missing) throw BundleError("bundle " + source.path + " is not signed", "sign it with evm-export --sign");
        throw BundleError(source.path + "/" + SIGNATURE + " cannot be read: " + error.what());
    }
    if (signature.size() != SIGNATURE_SIZE || !verified(known.get(), signature, manifest))
        throw BundleError("bundle " + source.path + " was changed after signing, or was signed with another key", "do not use the bundle");
}
#else
void check_signature(const Source &, const std::string &, const std::filesystem::path &) {
    throw ToolchainError("the SDK was built without OpenSSL and cannot check signatures", "install libssl-dev and build the SDK again with -DEVM_SIGNATURES=ON");
}
#endif

void check_nothing_else(const Source &source, const Manifest &manifest) {
    std::vector<Listed> found;
    try {
        found = source.list();
    } catch (const ReadError &error) {
        throw BundleError("bundle " + source.path + " cannot be read: " + error.what());
    }
    std::sort(found.begin(), found.end(), [](const Listed &a, const Listed &b) { return a.name < b.name; });
    std::set<std::string> listed{SIGNED_FILE, SIGNATURE};
    for (const auto &file : manifest.files) listed.insert(file.first);
    for (const auto &[name, link] : found) {
        if (link) throw BundleError("bundle " + source.path + ": " + name + " is a link", "use regular files in signed bundles");
        if (!listed.count(name))
            throw BundleError("bundle " + source.path + ": " + name + " is not in the manifest, and thus not signed", "remove the file");
    }
}

}  // namespace evm
