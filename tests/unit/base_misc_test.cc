#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

#include "base/crc32c.h"
#include "base/host.h"
#include "base/interrupt.h"
#include "base/json.h"
#include "base/log.h"
#include "base/sha256.h"
#include "base/subprocess.h"

namespace drover {
namespace {

namespace fs = std::filesystem;

struct Folder {
  fs::path path = fs::temp_directory_path() / ("drover_base_test_" + std::to_string(getpid()));
  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
  std::string file(const char* name) const { return (path / name).string(); }
};

std::string text_of(const std::string& file) {
  std::ifstream in(file);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

TEST(Crc32c, KnownVectors) {
  // RFC 3720, B.4.
  const std::vector<unsigned char> zeros(32, 0), ones(32, 0xff);
  std::vector<unsigned char> up(32), down(32);
  for (int i = 0; i < 32; ++i) {
    up[i] = static_cast<unsigned char>(i);
    down[i] = static_cast<unsigned char>(31 - i);
  }
  for (auto f : {crc32c, crc32c_portable}) {
    EXPECT_EQ(f(zeros.data(), 32, 0), 0x8a9136aau);
    EXPECT_EQ(f(ones.data(), 32, 0), 0x62a8ab43u);
    EXPECT_EQ(f(up.data(), 32, 0), 0x46dd794eu);
    EXPECT_EQ(f(down.data(), 32, 0), 0x113fdb5cu);
    EXPECT_EQ(f("123456789", 9, 0), 0xe3069283u);
    EXPECT_EQ(f("", 0, 0), 0u);
    EXPECT_EQ(f("6789", 4, f("12345", 5, 0)), 0xe3069283u);
  }
}

TEST(Crc32c, BothVersionsAgreeAtEveryLengthAndAlignment) {
  std::vector<unsigned char> data(300);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<unsigned char>(i * i * 31 + 7);
  for (size_t begin = 0; begin < 9; ++begin) {
    for (size_t size = 0; size + begin <= data.size(); ++size) {
      ASSERT_EQ(crc32c(&data[begin], size), crc32c_portable(&data[begin], size));
    }
  }
}

TEST(Sha256, KnownVectors) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  Folder folder;
  std::ofstream(folder.file("x")) << "abc";
  EXPECT_EQ(sha256_file(folder.file("x")), sha256_hex("abc"));
  EXPECT_THROW(sha256_file(folder.file("absent")), Error);
}

TEST(Wait, EndsWhenReady) {
  Interrupt interrupt;
  std::atomic<bool> ready{false};
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ready = true;
  });
  wait_until([&] { return ready.load(); }, deadline_in(30), interrupt, "the other thread");
  other.join();
  EXPECT_TRUE(ready);
}

TEST(Wait, DeadlineNamesWhatWasAwaited) {
  Interrupt interrupt;
  const auto begin = Clock::now();
  try {
    wait_until([] { return false; }, deadline_in(0.05), interrupt, "a plan from the leader");
    FAIL() << "no error at the deadline";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kLostPeer);
    EXPECT_NE(std::string(e.what()).find("a plan from the leader"), std::string::npos);
  }
  EXPECT_GE(Clock::now() - begin, std::chrono::milliseconds(50));
}

TEST(Wait, AReadyWaitIsNotAnErrorAfterTheDeadline) {
  Interrupt interrupt;
  EXPECT_NO_THROW(wait_until([] { return true; }, deadline_in(-1), interrupt, "nothing"));
}

TEST(Wait, InterruptEndsItWithTheFirstCause) {
  Interrupt interrupt;
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_TRUE(interrupt.raise(ExitCode::kBadInput, "first"));
    EXPECT_FALSE(interrupt.raise(ExitCode::kInternal, "second"));
  });
  try {
    wait_until([] { return false; }, deadline_in(30), interrupt, "a peer");
    ADD_FAILURE() << "not interrupted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_STREQ(e.what(), "first");
  }
  other.join();
  EXPECT_EQ(interrupt.cause(), "first");
  EXPECT_EQ(interrupt.code(), ExitCode::kBadInput);
  EXPECT_THROW(interrupt.check(), Error);
}

TEST(JsonFile, RoundTripsInOrderAndReplacesWhole) {
  Folder folder;
  const std::string file = folder.file("a.json");
  write_json(file, Json{{"zebra", 1}, {"apple", {1.5, "x"}}});
  EXPECT_EQ(read_json(file).dump(), R"({"zebra":1,"apple":[1.5,"x"]})");
  write_json(file, Json{{"b", 2}});
  EXPECT_EQ(read_json(file).dump(), R"({"b":2})");
  EXPECT_FALSE(fs::exists(file + ".tmp"));
}

TEST(JsonFile, AFailedWriteLeavesTheOldFile) {
  Folder folder;
  const std::string file = folder.file("a.json");
  write_json(file, Json{{"b", 2}});
  fs::create_directory(file + ".tmp");  // its temporary name cannot be opened
  try {
    write_json(file, Json{{"b", 3}});
    FAIL() << "written";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kEnvironment);
    EXPECT_NE(std::string(e.what()).find(file), std::string::npos);
  }
  EXPECT_EQ(read_json(file).dump(), R"({"b":2})");
}

TEST(JsonFile, BadInputNamesFileAndPlace) {
  Folder folder;
  std::ofstream(folder.file("bad.json")) << "{\n  \"a\": ,\n}";
  try {
    read_json(folder.file("bad.json"));
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_NE(std::string(e.what()).find("bad.json"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("line 2"), std::string::npos) << e.what();
  }
  EXPECT_THROW(read_json(folder.file("absent.json")), Error);
}

TEST(Log, LinesCarryHostAndRank) {
  Folder folder;
  log::init(3, folder.file("rank3.log"), false);
  log::info("hello {}", 42);
  log::flush();
  const std::string text = text_of(folder.file("rank3.log"));
  EXPECT_NE(text.find(hostname() + " rank 3 info: hello 42"), std::string::npos) << text;
  EXPECT_THROW(log::init(0, folder.file("no/such/folder/x.log") + "/", false), Error);
  log::init(-1, "", false);
}

// Otherwise what a rank starts could not be ended with SIGTERM.
TEST(Subprocess, HasNoSignalBlockedThatThisThreadHas) {
  sigset_t set, before;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  ASSERT_EQ(pthread_sigmask(SIG_BLOCK, &set, &before), 0);
  const Outcome o = run_program({"sh", "-c", "kill -TERM $$; echo still here"}, 20);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  EXPECT_EQ(o.code, -1) << o.output;
  EXPECT_EQ(o.output, "");
}

TEST(Host, FactsArePlausible) {
  EXPECT_FALSE(hostname().empty());
  EXPECT_FALSE(cpu_model().empty());
  EXPECT_GT(memory_total_bytes(), uint64_t{64} << 20);
  const uint64_t before = peak_rss_bytes();
  std::vector<char> block(64 << 20, 1);
  EXPECT_GT(block[12345], 0);
  EXPECT_GE(peak_rss_bytes(), before + (32 << 20));
  EXPECT_LT(peak_rss_bytes(), memory_total_bytes());
}

}  // namespace
}  // namespace drover
