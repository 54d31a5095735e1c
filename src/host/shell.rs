//! Quoting for a POSIX shell.

/// Quotes `word` so that any POSIX shell reads it back unchanged. No shell can read a NUL, so code
/// that builds a command from words that may contain one must refuse them.
///
/// `a b` becomes `'a b'`, `it's` becomes `'it'\''s'`. A word of letters, digits and `%+,-./:=@_` is
/// returned unchanged.
pub fn quote(word: &str) -> String {
    // Quoting inserts only ASCII, so UTF-8 stays valid.
    String::from_utf8_lossy(&quote_bytes(word.as_bytes())).into_owned()
}

/// Quotes a word like [`quote`], but the word need not be UTF-8.
pub fn quote_bytes(word: &[u8]) -> Vec<u8> {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"%+,-./:=@_".contains(b);
    if !word.is_empty() && word.iter().all(plain) {
        return word.to_vec();
    }
    let parts: Vec<&[u8]> = word.split(|b| *b == b'\'').collect();
    [b"'".as_slice(), &parts.join(br"'\''".as_slice()), b"'"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::command::{Command, run_any_status};
    use crate::locks::Cancel;

    #[test]
    fn quote_keeps_every_byte() {
        assert_eq!(quote("a\0b"), "'a\0b'");
        assert_eq!(
            quote_bytes(b"\xff'"),
            [b"'\xff".as_slice(), br"'\'''"].concat()
        );
    }

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
