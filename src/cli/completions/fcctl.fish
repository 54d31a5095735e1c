# Completions of fcctl for fish. To use them: fcctl completions fish | source
function __fcctl_complete
    set -l typed (commandline --current-process --tokenize --cut-at-cursor) (commandline --current-token --cut-at-cursor)
    fcctl __complete (math (count $typed) - 1) -- $typed 2>/dev/null
end
complete --command fcctl --no-files --keep-order --arguments '(__fcctl_complete)'
