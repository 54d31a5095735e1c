#compdef fcctl
# Completions of fcctl for zsh. To use them: source <(fcctl completions zsh)
_fcctl() {
    local -a typed found open closed
    local line value help
    typed=("${(@Q)words[1,CURRENT-1]}" "$PREFIX")
    found=("${(@f)$(fcctl __complete $((CURRENT - 1)) -- "${typed[@]}" 2>/dev/null)}")
    for line in "${found[@]}"; do
        [[ -n $line ]] || continue
        value=${line%%$'\t'*}
        help=${line#"$value"}
        help=${value//:/\\:}${help:+:${help#$'\t'}}
        # The word is not complete yet, so no space is added.
        if [[ $value == *[/=:] ]]; then open+=("$help"); else closed+=("$help"); fi
    done
    (( ${#closed} )) && _describe -V fcctl closed
    (( ${#open} )) && _describe -V fcctl open -S ''
}
if [[ $funcstack[1] == _fcctl ]]; then _fcctl "$@"; else compdef _fcctl fcctl; fi
