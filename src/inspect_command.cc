// drover inspect FILE: what a store or dataset holds.
#include <iostream>

#include "base/error.h"
#include "command_line.h"
#include "commands.h"
#include "model/inspect.h"

namespace drover {

int inspect_command(const std::vector<std::string>& arguments) {
  const std::vector<OptionRow> table{
      {"file", "", "model store or dataset (also without --file)"},
      {"no-verify", "no", "do not read and check every chunk"},
      {"help", "no", "print this"},
  };
  const Options o = Options::parse(table, arguments, {"file"});
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  DROVER_CHECK(!o.text("file").empty(), ExitCode::kUsage,
               "drover inspect FILE: the file is missing");
  inspect(o.text("file"), !o.flag("no-verify"), std::cout);
  return 0;
}

}  // namespace drover
