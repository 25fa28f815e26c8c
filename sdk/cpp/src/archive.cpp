#include "archive.h"

#include "evm/evm.hpp"
#include "inflate.h"
#include "platform.h"
#include "text.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <set>
#include <vector>

namespace evm {
namespace {

constexpr std::size_t MAX_FILES = 10'000;
constexpr std::uint64_t MAX_BYTES = std::uint64_t{4} << 30;  // largest unpacked size of a bundle
constexpr std::uint64_t MAX_RATIO = 200;                     // largest ratio of unpacked to packed size; more is a zip bomb
constexpr std::uint64_t SMALL = 1 << 20;                     // files up to this size in bytes may have any ratio
constexpr std::uint64_t MAX_DIRECTORY = 64 << 20;            // largest size of the list of files, in bytes
constexpr const char *MANIFEST = "manifest.json";

// Reader of the little-endian fields of a record.
struct Record {
    const unsigned char *bytes;
    std::uint32_t u16(std::size_t at) const { return bytes[at] | bytes[at + 1] << 8; }
    std::uint32_t u32(std::size_t at) const { return u16(at) | u16(at + 2) << 16; }
};

struct Entry {
    std::uint64_t packed, size, offset;  // offset: position of the entry's header in the file
    std::uint32_t method, crc;
};

class Zip : public Source {
    std::map<std::string, Entry> entries_;
    std::string root_;  // folder of the bundle inside the zip, with a slash; empty for the root

  public:
    explicit Zip(const std::filesystem::path &file) : Source(utf8(file)) {
        std::ifstream stream = opened();
        read_directory(stream);
        root_ = root();
    }

    void read(const std::string &name, const Sink &sink) const override {
        const Entry &entry = find(name);
        std::ifstream stream = opened();
        // The header before the content repeats the fields of the directory; its variable fields may have other lengths.
        const std::string header = block(stream, entry.offset, 30);
        const Record local{reinterpret_cast<const unsigned char *>(header.data())};
        if (local.u32(0) != 0x04034b50) throw damaged("Bad magic number for file header");
        const std::uint64_t start = entry.offset + 30 + local.u16(26) + local.u16(28);
        if (block(stream, entry.offset + 30, local.u16(26)) != root_ + name)
            throw damaged("File name in directory and header differ: " + in_quotes(root_ + name));
        stream.seekg(static_cast<std::streamoff>(start));
        Inflate inflate(entry.method == 0 ? Inflate::STORED : Inflate::DEFLATED);
        std::uint64_t size = 0;
        const std::uint64_t most = std::max(SMALL, std::min(MAX_BYTES, MAX_RATIO * entry.packed));
        const Sink counted = [&](const char *data, std::size_t count) {
            size += count;
            if (size > most) throw bomb(name);
            sink(data, count);
        };
        std::vector<char> packed(1 << 16);
        for (std::uint64_t left = entry.packed; left > 0;) {
            const std::size_t take = static_cast<std::size_t>(std::min<std::uint64_t>(left, packed.size()));
            if (!stream.read(packed.data(), static_cast<std::streamsize>(take))) throw damaged("the file ends inside " + name);
            if (!inflate.add(packed.data(), take, counted)) throw damaged(name + ": " + inflate.reason());
            left -= take;
        }
        if (!inflate.ended()) throw damaged(name + ": incomplete or truncated stream");
        if (size != entry.size || inflate.crc() != entry.crc) throw damaged("Bad CRC-32 for file " + in_quotes(name));
    }

    std::uint64_t size(const std::string &name) const override { return find(name).size; }

    std::vector<Listed> list() const override {
        std::vector<Listed> found;
        for (const auto &entry : entries_)
            if (entry.first.compare(0, root_.size(), root_) == 0) found.push_back({entry.first.substr(root_.size()), false});
        return found;
    }

    bool on_disk() const override { return false; }

  private:
    const Entry &find(const std::string &name) const {
        const auto found = entries_.find(root_ + name);
        if (found == entries_.end()) throw ReadError("No such file or directory", true);
        return found->second;
    }

    std::ifstream opened() const {
        std::ifstream stream(path_of(path), std::ios::binary);
        if (!stream) throw damaged("the file cannot be opened");
        return stream;
    }

    BundleError damaged(const std::string &reason) const {
        return BundleError(path + " is damaged or not a zip file: " + reason, "copy the zip again", {"zip.damaged"});
    }
    BundleError refused(const std::string &name, const std::string &reason) const {
        return BundleError(path + (name.empty() ? " " : ": " + in_quotes(name) + " ") + reason, "", {"zip.refused", name});
    }
    BundleError bomb(const std::string &name) const { return refused(name, "unpacks to over " + std::to_string(MAX_RATIO) + " times its size: possible zip bomb"); }

    std::string block(std::ifstream &stream, std::uint64_t at, std::size_t size) const {
        std::string bytes(size, '\0');
        stream.seekg(static_cast<std::streamoff>(at));
        if (!stream.read(bytes.data(), static_cast<std::streamsize>(size))) throw damaged("the file ends too soon");
        return bytes;
    }

    // Read the directory at the end of the file and check every entry.
    void read_directory(std::ifstream &stream) {
        stream.seekg(0, std::ios::end);
        const std::uint64_t length = static_cast<std::uint64_t>(stream.tellg());
        const std::uint64_t tail = std::min<std::uint64_t>(length, 22 + 0xffff);  // the end record and the longest comment
        const std::string end = block(stream, length - tail, static_cast<std::size_t>(tail));
        std::size_t at = end.size() < 22 ? std::string::npos : end.rfind("PK\x05\x06", end.size() - 22);
        if (at == std::string::npos) throw damaged("File is not a zip file");
        const Record record{reinterpret_cast<const unsigned char *>(end.data() + at)};
        const std::size_t count = record.u16(10);
        const std::uint64_t size = record.u32(12), offset = record.u32(16);
        // Zips that need 64-bit records are beyond the limits below, so 64-bit records are not read.
        if (count > MAX_FILES) throw refused("", "has " + std::to_string(count) + " files; a bundle has at most " + std::to_string(MAX_FILES));
        if (offset + size > length || size > MAX_DIRECTORY) throw damaged("Bad magic number for central directory");
        const std::string directory = block(stream, offset, static_cast<std::size_t>(size));
        std::set<std::string> seen;
        std::uint64_t sum = 0;
        std::size_t next = 0;
        for (std::size_t i = 0; i < count; i++) {
            next = add(directory, next, seen, sum);
            if (sum > MAX_BYTES) throw refused("", "unpacks to more than " + std::to_string(MAX_BYTES >> 30) + " GB");
        }
    }

    // Check and add one entry of the directory; return the position of the next entry.
    std::size_t add(const std::string &directory, std::size_t at, std::set<std::string> &seen, std::uint64_t &sum) {
        const Record record{reinterpret_cast<const unsigned char *>(directory.data() + at)};
        if (directory.size() - at < 46 || record.u32(0) != 0x02014b50) throw damaged("Bad magic number for central directory");
        const std::size_t name_size = record.u16(28), next = at + 46 + name_size + record.u16(30) + record.u16(32);
        if (next > directory.size()) throw damaged("Truncated central directory");
        const std::string name = directory.substr(at + 46, name_size);
        if (!name.empty() && name.back() == '/') return next;  // a folder
        const Entry entry{record.u32(20), record.u32(24), record.u32(42), record.u16(10), record.u32(16)};
        const std::uint32_t kind = record.u32(38) >> 16 & 0170000;
        if (!inside_bundle(name)) throw refused(name, "leaves the bundle");
        if (kind != 0 && kind != 0100000) throw refused(name, "is a link or a device; only regular files are allowed");
        if (record.u16(8) & 1) throw refused(name, "is encrypted");
        if (entry.method != 0 && entry.method != 8)
            throw damaged("compression method " + std::to_string(entry.method) + " of " + name);
        std::string folded = name;
        for (char &c : folded)
            if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
        if (!seen.insert(folded).second) throw refused(name, "occurs twice");
        if (entry.size > std::max(SMALL, MAX_RATIO * entry.packed)) throw bomb(name);
        sum += entry.size;
        entries_[name] = entry;
        return next;
    }

    // Return the folder that contains the manifest: the root of the zip, or one of its folders. Other folders do not count,
    // such as __MACOSX, which the Finder adds.
    std::string root() const {
        if (entries_.count(MANIFEST)) return "";
        std::vector<std::string> holding;
        for (const auto &[name, entry] : entries_) {
            const std::string folder = name.substr(0, name.find('/') + 1);
            if (!folder.empty() && name == folder + MANIFEST) holding.push_back(folder);
        }
        if (holding.size() == 1) return holding[0];
        if (!holding.empty()) throw BundleError(path + " holds several bundles: " + holding[0] + ", " + holding[1], "unpack it, and give one folder", {"zip.refused"});
        throw BundleError(path + " is not a bundle: no " + MANIFEST + " inside", "make one with evm-export --zip", {"manifest.missing"});
    }
};

}  // namespace

std::unique_ptr<Source> open_zip(const std::filesystem::path &file) {
    if (!Inflate::available())
        throw ToolchainError("the SDK was built without zlib and cannot open zips", "install zlib1g-dev and build the SDK again, or unpack " + utf8(file));
    return std::make_unique<Zip>(file);
}

}  // namespace evm
