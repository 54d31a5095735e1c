//! Turns the Markdown of a help page into a man page. It knows the forms that the pages use:
//! headings, paragraphs, lists, tables, indented code, and code, emphasis and links in a line.

/// Returns the man page of a topic.
pub(super) fn page(topic: &str, about: &str, markdown: &str, section: &str) -> String {
    let name = format!("fcd-{topic}");
    let mut out = format!(
        ".TH {} {section} \"\" \"fcd {}\" fcd\n.SH NAME\n{} \\- {}\n.SH DESCRIPTION\n",
        name.to_uppercase(),
        env!("CARGO_PKG_VERSION"),
        escape(&name),
        escape(about),
    );
    let mut lines = markdown
        .lines()
        .filter(|line| !line.starts_with("<!--") && !line.starts_with("# "))
        .peekable();
    while let Some(line) = lines.next() {
        // Takes the following lines that belong to this one.
        let mut block = |belongs: &dyn Fn(&str) -> bool| {
            let mut all = vec![line];
            while let Some(next) = lines.next_if(|next| belongs(next)) {
                all.push(next);
            }
            all
        };
        if line.is_empty() {
        } else if let Some(title) = line.strip_prefix("### ") {
            out += &format!(".SS {}\n", heading(title));
        } else if let Some(title) = line.strip_prefix("## ") {
            out += &format!(".SH {}\n", heading(title));
        } else if line.starts_with("    ") {
            let code = block(&|next| next.starts_with("    ") || next.is_empty());
            out += &code_block(&code);
        } else if line.starts_with('|') {
            out += &table(&block(&|next| next.starts_with('|')));
        } else if line.starts_with("- ") {
            let item = block(&|next| next.starts_with("  "));
            out += &format!(".IP \\(bu 2\n{}", text(&item.join(" ")[2..]));
        } else {
            let begins = |next: &str| {
                next.is_empty()
                    || ["    ", "|", "- ", "#"]
                        .iter()
                        .any(|form| next.starts_with(form))
            };
            let paragraph = block(&|next| !begins(next));
            out += &format!(".PP\n{}", text(&paragraph.join(" ")));
        }
    }
    out
}

fn heading(title: &str) -> String {
    format!("\"{}\"", inline(title).replace('"', "\\(dq"))
}

fn code_block(lines: &[&str]) -> String {
    let end = lines.iter().rposition(|line| !line.is_empty()).unwrap_or(0);
    let lines: String = lines[..=end]
        .iter()
        .map(|line| {
            format!(
                "{}\n",
                guard(&escape(line.strip_prefix("    ").unwrap_or(line)))
            )
        })
        .collect();
    format!(".PP\n.RS 4\n.nf\n{lines}.fi\n.RE\n")
}

/// Returns a table as a list, as man pages have them: the first cell of each row, and below it the
/// other cells, with their headings if there are several. The second line of a table is a rule.
fn table(lines: &[&str]) -> String {
    let cells = |line: &str| -> Vec<String> {
        let inside = line.trim().trim_start_matches('|').trim_end_matches('|');
        inside.split('|').map(|cell| inline(cell.trim())).collect()
    };
    let headings = lines.first().map(|line| cells(line)).unwrap_or_default();
    let row = |line: &&str| {
        let cells = cells(line);
        let (first, others) = cells.split_first()?;
        let others: Vec<String> = others
            .iter()
            .enumerate()
            .filter(|(_, cell)| !cell.is_empty())
            .map(|(i, cell)| match headings.get(i + 1) {
                Some(heading) if cells.len() > 2 && !heading.is_empty() => {
                    format!("{heading}: {cell}")
                }
                _ => cell.clone(),
            })
            .collect();
        let others = others.join(";\n");
        Some(format!(".TP\n{}\n{}\n", guard(first), guard(&others)))
    };
    lines.iter().skip(2).filter_map(row).collect()
}

fn text(markdown: &str) -> String {
    format!("{}\n", guard(&inline(markdown)))
}

/// Protects a line that begins with a dot or an apostrophe, which roff would read as a request.
fn guard(line: &str) -> String {
    if line.starts_with(['.', '\'']) {
        format!("\\&{line}")
    } else {
        line.to_owned()
    }
}

/// Converts code, emphasis and links in a text.
fn inline(markdown: &str) -> String {
    let mut out = String::new();
    let mut rest = markdown;
    while let Some(at) = rest.find(['`', '*', '[']) {
        let (before, from) = rest.split_at(at);
        out += &escape(before);
        let enclosed = |mark: &str| {
            let inside = from.strip_prefix(mark)?;
            let end = inside.find(mark).filter(|end| *end > 0)?;
            Some((&inside[..end], &inside[end + mark.len()..]))
        };
        let link = || {
            let (label, after) = from.strip_prefix('[')?.split_once("](")?;
            let (_, after) = after.split_once(')')?;
            (!label.contains(']')).then_some((label, after))
        };
        if let Some((code, after)) = enclosed("`") {
            out += &format!("\\fB{}\\fR", escape(code));
            rest = after;
        } else if let Some((strong, after)) = enclosed("**") {
            out += &format!("\\fB{}\\fR", escape(strong));
            rest = after;
        } else if let Some((emphasis, after)) = enclosed("*").filter(|(e, _)| !e.starts_with(' ')) {
            out += &format!("\\fI{}\\fR", escape(emphasis));
            rest = after;
        } else if let Some((label, after)) = link() {
            out += &escape(label);
            rest = after;
        } else {
            out += &from[..1];
            rest = &from[1..];
        }
    }
    out + &escape(rest)
}

/// Escapes what roff would change. A dash stays a dash that can be copied to a command line.
fn escape(text: &str) -> String {
    text.replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq")
        .replace('`', "\\(ga")
        .replace('^', "\\(ha")
        .replace('~', "\\(ti")
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn forms_are_converted() {
        let markdown = "\
# Title

A paragraph with `code`, *emphasis*, **strong** text and [a link](x.md)
on two lines.

## It's \"quoted\"

    fcctl run -- make
    .dotted \\n

- first
  continued
- second [[sync]] 2 * 3
<!-- skipped -->

| a | b |
|---|---|
| `x@y` | a cell that is long enough to be wrapped |

| first | another | third | fourth |
|---|---|---|---|
| .z | `b` | c | |
";
        expect![[r#"
            .TH FCD-TOPIC 7 "" "fcd 0.1.0" fcd
            .SH NAME
            fcd\-topic \- what it is about
            .SH DESCRIPTION
            .PP
            A paragraph with \fBcode\fR, \fIemphasis\fR, \fBstrong\fR text and a link on two lines.
            .SH "It\(aqs \(dqquoted\(dq"
            .PP
            .RS 4
            .nf
            fcctl run \-\- make
            \&.dotted \en
            .fi
            .RE
            .IP \(bu 2
            first   continued
            .IP \(bu 2
            second [[sync]] 2 * 3
            .TP
            \fBx@y\fR
            a cell that is long enough to be wrapped
            .TP
            \&.z
            another: \fBb\fR;
            third: c
        "#]]
        .assert_eq(&page("topic", "what it is about", markdown, "7"));
    }
}
