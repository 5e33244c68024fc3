#include "base/options.h"

#include <algorithm>
#include <boost/program_options.hpp>
#include <cmath>
#include <fstream>
#include <sstream>
#include <utility>

#include "base/error.h"

namespace po = boost::program_options;

namespace drover {

namespace {

bool is_switch(const OptionRow& row) { return std::string(row.value) == "no"; }

po::options_description describe(std::span<const OptionRow> table) {
  po::options_description all("options", 100, 60);
  for (const auto& row : table) {
    auto* value = po::value<std::string>();
    if (is_switch(row)) value->implicit_value("yes", "");
    all.add_options()(row.name, value, row.help);
  }
  return all;
}

// Levenshtein distance, for "did you mean".
size_t distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j < row.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t next = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = std::exchange(row[j], next);
    }
  }
  return row[b.size()];
}

std::string nearest(std::span<const OptionRow> table, std::string name) {
  name.erase(0, name.find_first_not_of('-'));
  const auto best = std::min_element(table.begin(), table.end(), [&](const auto& a, const auto& b) {
    return distance(a.name, name) < distance(b.name, name);
  });
  if (best == table.end() || distance(best->name, name) > name.size() / 2) return "";
  return std::string("; did you mean --") + best->name + "?";
}

}  // namespace

Options Options::parse(std::span<const OptionRow> table, const std::vector<std::string>& arguments,
                       const std::vector<std::string>& positional) {
  const auto all = describe(table);
  po::positional_options_description places;
  for (const auto& p : positional) places.add(p.c_str(), 1);
  po::variables_map map;
  try {
    po::store(
        po::command_line_parser(arguments)
            .options(all)
            .positional(places)
            .style(po::command_line_style::default_style & ~po::command_line_style::allow_guessing)
            .run(),
        map);
  } catch (const po::unknown_option& e) {
    DROVER_FAIL(ExitCode::kUsage, "unknown option {}{} (--help lists them)", e.get_option_name(),
                nearest(table, e.get_option_name()));
  } catch (const po::error& e) {
    DROVER_FAIL(ExitCode::kUsage, "{} (--help lists the options)", e.what());
  }
  if (map.count("config") != 0 && !map["config"].as<std::string>().empty()) {
    const auto file = map["config"].as<std::string>();
    std::ifstream in(file);
    DROVER_CHECK(in.good(), ExitCode::kBadInput, "--config {}: the file cannot be read", file);
    try {
      po::store(po::parse_config_file(in, all), map);
    } catch (const po::unknown_option& e) {
      DROVER_FAIL(ExitCode::kUsage, "{}: unknown key {}{}", file, e.get_option_name(),
                  nearest(table, e.get_option_name()));
    } catch (const po::error& e) {
      DROVER_FAIL(ExitCode::kBadInput, "{}: {}", file, e.what());
    }
  }
  Options options;
  for (const auto& row : table) {
    options.given_[row.name] = map.count(row.name) != 0;
    options.values_[row.name] =
        map.count(row.name) != 0 ? map[row.name].as<std::string>() : std::string(row.value);
  }
  return options;
}

std::string Options::help(std::span<const OptionRow> table) {
  std::string text;
  for (const auto& row : table) {
    const std::string value =
        is_switch(row) || row.value[0] == 0 ? "" : fmt::format(" [{}]", row.value);
    text += fmt::format("  --{:<18} {}{}\n", row.name, row.help, value);
  }
  return text;
}

const std::string& Options::text(const std::string& name) const {
  const auto i = values_.find(name);
  DROVER_CHECK(i != values_.end(), ExitCode::kInternal, "no option --{} in the table", name);
  return i->second;
}

bool Options::given(const std::string& name) const {
  const auto i = given_.find(name);
  return i != given_.end() && i->second;
}

bool Options::flag(const std::string& name) const {
  const auto& v = text(name);
  if (v == "yes" || v == "true" || v == "1" || v == "on") return true;
  if (v == "no" || v == "false" || v == "0" || v == "off") return false;
  DROVER_FAIL(ExitCode::kUsage, "--{} {}: expected yes or no", name, v);
}

int64_t Options::integer(const std::string& name, int64_t least, int64_t most) const {
  const auto& v = text(name);
  int64_t value = 0;
  size_t used = 0;
  try {
    value = std::stoll(v, &used);
  } catch (const std::exception&) {
    used = std::string::npos;
  }
  DROVER_CHECK(used == v.size() && value >= least && value <= most, ExitCode::kUsage,
               "--{} {}: expected a whole number from {} to {}", name, v, least, most);
  return value;
}

double Options::number(const std::string& name, double least, double most) const {
  const auto& v = text(name);
  double value = 0;
  size_t used = 0;
  try {
    value = std::stod(v, &used);
  } catch (const std::exception&) {
    used = std::string::npos;
  }
  DROVER_CHECK(used == v.size() && std::isfinite(value) && value >= least && value <= most,
               ExitCode::kUsage, "--{} {}: expected a number from {} to {}", name, v, least, most);
  return value;
}

int64_t Options::bytes(const std::string& name) const {
  const auto& v = text(name);
  if (v.empty()) return 0;
  static const std::map<std::string, double> units{
      {"", 1},          {"B", 1},         {"K", 1e3},       {"KB", 1e3},       {"M", 1e6},
      {"MB", 1e6},      {"G", 1e9},       {"GB", 1e9},      {"T", 1e12},       {"TB", 1e12},
      {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1LL << 40}};
  size_t used = 0;
  double value = -1;
  try {
    value = std::stod(v, &used);
  } catch (const std::exception&) {
    value = -1;
  }
  const auto unit = value < 0 ? units.end() : units.find(v.substr(used));
  DROVER_CHECK(unit != units.end() && std::isfinite(value) && value * unit->second < 9e18,
               ExitCode::kUsage, "--{} {}: expected a size such as 512MiB or 2GiB", name, v);
  return static_cast<int64_t>(value * unit->second);
}

std::vector<std::string> Options::list(const std::string& name) const {
  std::vector<std::string> items;
  std::stringstream in(text(name));
  for (std::string item; std::getline(in, item, ',');) {
    if (!item.empty()) items.push_back(item);
  }
  return items;
}

std::map<std::string, std::string> read_ini(const std::string& file) {
  std::ifstream in(file);
  DROVER_CHECK(in.good(), ExitCode::kBadInput, "{}: the file cannot be read", file);
  po::options_description none;
  std::map<std::string, std::string> values;
  try {
    for (const auto& o : po::parse_config_file(in, none, true).options) {
      const bool first =
          values.emplace(o.string_key, o.value.empty() ? "" : o.value.front()).second;
      DROVER_CHECK(first, ExitCode::kBadInput, "{}: {} is given twice", file, o.string_key);
    }
  } catch (const po::error& e) {
    DROVER_FAIL(ExitCode::kBadInput, "{}: {}", file, e.what());
  }
  return values;
}

}  // namespace drover
