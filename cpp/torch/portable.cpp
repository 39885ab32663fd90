// What lets a library that a new compiler built run on old systems: nothing of it is newer than glibc 2.17 and the libstdc++ of
// gcc 5. Each definition here stands for a newer one of glibc or libstdc++ that the compiler's headers refer to. exports.map keeps
// all of them inside the library, and CMakeLists.txt names libstdc++ before torch's libraries, some of which export a few of the
// same.
#include <new>
#include <sstream>

#if defined(__linux__)
// glibc 2.32. shared_ptr counts without atomic instructions while it is not 0; 0 is always right.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif

#if defined(__GLIBCXX__)
namespace std {
// libstdc++ of gcc 11
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// libstdc++ of gcc 9 to 12 has the members that C++17 and C++20 added
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
#endif
