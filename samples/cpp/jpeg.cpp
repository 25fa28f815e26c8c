// Decoding of JPEGs with libjpeg, if CMake finds it. Pillow and the browsers use the same library, so the pixels are equal to the
// bit. Pixels from stb_image differ by up to 2 of 255.
#include "image.h"

#include <csetjmp>
#include <cstdio>
#include <jpeglib.h>

namespace {

// Error handler of libjpeg. libjpeg calls error_exit, which must not return.
struct Reporter {
    jpeg_error_mgr manager;
    std::jmp_buf back;
};

[[noreturn]] void leave(j_common_ptr decoder) { std::longjmp(reinterpret_cast<Reporter *>(decoder->err)->back, 1); }

void say_nothing(j_common_ptr, int) {}

}  // namespace

bool decode_jpeg(const std::vector<unsigned char> &bytes, RgbImage &image) {
    jpeg_decompress_struct decoder;
    Reporter reporter;
    decoder.err = jpeg_std_error(&reporter.manager);
    reporter.manager.error_exit = leave;
    reporter.manager.emit_message = say_nothing;
    if (setjmp(reporter.back)) {
        jpeg_destroy_decompress(&decoder);
        return false;
    }
    jpeg_create_decompress(&decoder);
    jpeg_mem_src(&decoder, const_cast<unsigned char *>(bytes.data()), static_cast<unsigned long>(bytes.size()));
    jpeg_read_header(&decoder, TRUE);
    const bool fits = decoder.num_components != 4 && static_cast<int>(decoder.image_width) == image.width &&
                      static_cast<int>(decoder.image_height) == image.height;
    if (fits) {  // images with four components (CMYK) are left to stb_image, which converts them to RGB
        decoder.out_color_space = JCS_RGB;
        jpeg_start_decompress(&decoder);
        while (decoder.output_scanline < decoder.output_height) {
            JSAMPROW row = &image.rgb[3 * static_cast<std::size_t>(image.width) * decoder.output_scanline];
            jpeg_read_scanlines(&decoder, &row, 1);
        }
        jpeg_finish_decompress(&decoder);
    }
    jpeg_destroy_decompress(&decoder);
    return fits;
}
