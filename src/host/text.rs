//! Makes text from guests, VMMs, callers and programs harmless. In an error, a log or on a terminal
//! it must not move the cursor, change the screen or reverse the reading direction.

/// How many characters [`quoted`] shows.
const QUOTED_CHARS_MAX: usize = 64;

/// Escapes control characters, line separators and characters that change the reading direction.
/// Quotes and backslashes stay, because the text itself is what a user should read.
pub fn printable(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmful(c) {
            out.extend(c.escape_default())
        } else {
            out.push(c)
        }
    }
    out
}

/// Makes text harmless like [`printable`], but keeps line breaks and tabs, and removes whole escape
/// sequences. Use it for the output of a guest.
pub fn printable_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\n' | '\t' => out.push(c),
            // Consoles end lines with \r\n.
            '\r' => {}
            '\u{1b}' => skip_escape(&mut chars),
            c if is_harmful(c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// Puts the beginning of a text in quotes, with everything escaped that could be mistaken for their
/// end. Use it for input that should have been a name, an id or a word of the protocol.
pub fn quoted(text: &str) -> String {
    let short: String = text.chars().take(QUOTED_CHARS_MAX).collect();
    let rest = if short.len() < text.len() { "..." } else { "" };
    format!("{short:?}{rest}")
}

/// True for printable ASCII, which most text is.
pub fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b' '..=b'~'))
}

fn is_harmful(c: char) -> bool {
    // Control characters, line and paragraph separators, and bidirectional marks, embeddings and
    // isolates (UAX 9).
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Skips a whole escape sequence, so that no remainder such as `[0;32m` is printed. CSI ends at its
/// final byte. OSC and similar sequences end at BEL or ST. Of any other sequence, one character is
/// skipped (ECMA-48, 5.4 and 5.6). Never skips past the end of the line.
fn skip_escape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    let Some(kind) = chars.next_if(|c| *c != '\n') else {
        return;
    };
    match kind {
        '[' => {
            while chars
                .next_if(|c| ('\u{20}'..='\u{3f}').contains(c))
                .is_some()
            {}
            chars.next_if(|c| ('\u{40}'..='\u{7e}').contains(c));
        }
        ']' | 'P' | 'X' | '^' | '_' => {
            while let Some(c) = chars.next_if(|c| *c != '\n') {
                if c == '\u{7}' {
                    return;
                }
                if c == '\u{1b}' {
                    chars.next_if_eq(&'\\');
                    return;
                }
            }
        }
        '\u{20}'..='\u{2f}' => {
            chars.next_if(|c| *c != '\n');
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn printable_escapes_only_terminal_control() {
        let same = "it's \"plain\" \\ e\u{301} \u{1f468}\u{200d}\u{1f469} \u{645}\u{200c}\u{627}";
        assert_eq!(printable(same), same);
        assert_eq!(
            printable("\u{1b}[31mx\ny\t\r\0\u{7f}\u{9b}2J"),
            r"\u{1b}[31mx\ny\t\r\u{0}\u{7f}\u{9b}2J"
        );
        assert_eq!(
            printable("a\u{202e}b\u{2066}c\u{200f}d\u{61c}e\u{2028}f"),
            r"a\u{202e}b\u{2066}c\u{200f}d\u{61c}e\u{2028}f"
        );
    }

    #[test]
    fn printable_lines_removes_terminal_control() {
        expect![[r#"
            "ok red title\n\\u{7}x\n\ty \\u{202e}z"
        "#]]
        .assert_eq(&format!(
            "{:?}\n",
            printable_lines("ok \u{1b}[1;31mred\u{1b}[0m \u{1b}]0;pwned\u{7}title\r\n\u{7}x\n\ty \u{202e}z\u{1b}")
        ));
        // An unfinished sequence ends at the end of its line.
        assert_eq!(printable_lines("\u{1b}]0;x\nnext\u{1b}[12"), "\nnext");
        assert!(!printable_lines("\u{9b}31m").contains('\u{9b}'));
    }

    #[test]
    fn quoted_text_is_bounded_and_escapes_quotes() {
        assert_eq!(quoted("it's a \"x\"\n"), r#""it's a \"x\"\n""#);
        let long = quoted(&"é".repeat(65));
        assert_eq!(long, format!("\"{}\"...", "é".repeat(64)));
        assert_eq!(quoted(&"x".repeat(64)), format!("\"{}\"", "x".repeat(64)));
    }
}
