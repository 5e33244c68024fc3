// Command line and config file against one table. The only place that includes Boost.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace drover {

// One line of the table. A default of "no" makes a switch (present: "yes"); an empty one means
// not given.
struct OptionRow {
  const char* name;
  const char* value;
  const char* help;
};

class Options {
 public:
  // `arguments` without the program's and the subcommand's names. A row named "config" is a file of
  // `key = value` lines with the same keys; the command line wins. Rows named in `positional` also
  // take arguments without a name, in that order. Throws kUsage (kBadInput for the file): unknown
  // names, missing values, the nearest name.
  static Options parse(std::span<const OptionRow> table, const std::vector<std::string>& arguments,
                       const std::vector<std::string>& positional = {});
  static std::string help(std::span<const OptionRow> table);

  const std::string& text(const std::string& name) const;
  bool given(const std::string& name) const;  // by the user, not by default
  bool flag(const std::string& name) const;
  // Throws kUsage naming the option and the range.
  int64_t integer(const std::string& name, int64_t least, int64_t most) const;
  double number(const std::string& name, double least, double most) const;
  // "512MiB", "2GiB", "4096", "1.5G": bytes. 0 when empty.
  int64_t bytes(const std::string& name) const;
  std::vector<std::string> list(const std::string& name) const;  // comma-separated

  const std::map<std::string, std::string>& values() const { return values_; }

 private:
  std::map<std::string, std::string> values_;
  std::map<std::string, bool> given_;
};

// An INI file as "section.key" -> value. kBadInput naming the line, or a key that comes twice.
std::map<std::string, std::string> read_ini(const std::string& file);

}  // namespace drover
