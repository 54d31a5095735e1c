# Completions of fcctl for bash. To use them: source <(fcctl completions bash)
_fcctl() {
    # bash splits words at : and =, as in gcc:13. Words without a space between them are one word.
    local rest=${COMP_LINE:0:COMP_POINT} words=() word i
    for ((i = 0; i <= COMP_CWORD; i++)); do
        if [[ $i == 0 || $rest == [[:space:]]* ]]; then
            rest=${rest#"${rest%%[![:space:]]*}"}
            words+=("")
        fi
        word=${COMP_WORDS[i]}
        # Only the part before the cursor counts.
        ((i < COMP_CWORD)) || word=$rest
        words[-1]+=$word
        rest=${rest#"$word"}
    done
    local found current=${words[-1]} before=
    mapfile -t found < <(fcctl __complete "$((${#words[@]} - 1))" -- "${words[@]}" 2>/dev/null)
    # bash replaces only the part after the last : or = of a word.
    case $current in
    *[:=]*) before=${current%"${current##*[:=]}"} ;;
    esac
    COMPREPLY=()
    for word in "${found[@]}"; do
        # A description follows after a tab.
        word=${word%%$'\t'*}
        printf -v word %q "$word"
        COMPREPLY+=("${word#"$before"}")
    done
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[/=:] ]]; then
        compopt -o nospace
    fi
}
complete -F _fcctl fcctl
