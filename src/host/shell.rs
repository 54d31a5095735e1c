//! Quoting for a POSIX shell.

/// Quotes `word` so that any POSIX shell reads it back unchanged. NUL cannot be passed and is
/// dropped.
///
/// `a b` becomes `'a b'`, `it's` becomes `'it'\''s'`. A word of letters, digits and `%+,-./:=@_` is
/// returned unchanged.
pub fn quote(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"%+,-./:=@_".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    let mut out = String::with_capacity(word.len() + 2);
    out.push('\'');
    for c in word.chars().filter(|c| *c != '\0') {
        if c == '\'' {
            out.push_str("'\\''")
        } else {
            out.push(c)
        }
    }
    out.push('\'');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::command::{Command, run_any_status};
    use crate::locks::Cancel;

    #[test]
    fn quoted_words_are_read_back_unchanged_by_a_shell() {
        let words = [
            "",
            "a",
            "a b",
            "it's",
            "'",
            "''",
            "$(x) `y` \\ \" * ? ~ # ! & ; | < >",
            "-rf",
            "a\nb\tc",
            "\u{1b}[0m",
            "é",
            "%s",
        ];
        let line: Vec<String> = words.iter().map(|w| quote(w)).collect();
        let script = format!("printf '%s\\0' {}", line.join(" "));
        let out = run_any_status(
            &Command::new("sh").args(["-c", &script]),
            &Cancel::try_new().unwrap(),
            &mut |_| {},
        )
        .unwrap();
        let back: Vec<&[u8]> = out.stdout.split(|b| *b == 0).collect();
        assert_eq!(back[..words.len()], words.map(str::as_bytes));
    }
}
