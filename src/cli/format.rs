//! `--format` and `--sort` of lists: the fields of an item, templates, and the order.
//!
//! A template is a text with fields such as `{{.Name}}`, as with docker. A leading `table` adds a
//! header and aligns columns that are separated by tabs. `--format json` is the same as `--json`.

use super::output::{self, age, size};
use super::printer::Printer;
use crate::error::Error;
use crate::host::text::{printable, quoted};
use serde::Serialize;

/// A property of an item, by its name in templates.
pub(super) struct Field<T: 'static> {
    pub name: &'static str,
    pub header: &'static str,
    pub value: fn(&T) -> Value,
}

pub(super) const fn field<T>(
    name: &'static str,
    header: &'static str,
    value: fn(&T) -> Value,
) -> Field<T> {
    Field {
        name,
        header,
        value,
    }
}

/// The value of a field. Values are sorted by what they mean and not by their text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Value {
    Missing,
    Number(u64),
    Bytes(u64),
    /// A time in seconds since the epoch.
    Time(u64),
    Text(String),
}

impl Value {
    pub(super) fn text(value: impl ToString) -> Self {
        Self::Text(value.to_string())
    }

    pub(super) fn optional(value: Option<impl ToString>) -> Self {
        value.map_or(Self::Missing, Self::text)
    }

    fn show(&self, now_s: u64) -> String {
        match self {
            Self::Missing => String::new(),
            Self::Number(n) => n.to_string(),
            Self::Bytes(n) => size(*n),
            Self::Time(at) => age(now_s, *at),
            Self::Text(text) => printable(text),
        }
    }
}

/// Lists the names of fields for an error's hint.
fn names<T>(fields: &[Field<T>]) -> String {
    let names: Vec<_> = fields.iter().map(|f| format!(".{}", f.name)).collect();
    format!("fields: {}", names.join(" "))
}

/// A parsed `--format`.
#[derive(Debug, PartialEq)]
pub(super) struct Template {
    /// The columns of a table, or everything in one column.
    columns: Vec<Vec<Part>>,
    is_table: bool,
}

#[derive(Debug, PartialEq)]
enum Part {
    Text(String),
    /// The index of the field among all fields.
    Field(usize),
}

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// `invalid_argument` for an unknown field. The hint lists the known ones.
    pub(super) fn parse<T>(text: &str, fields: &[Field<T>]) -> Result<Self, Error> {
        let (is_table, text) = match text.strip_prefix("table ") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        let columns: Vec<&str> = match is_table {
            true => text.split('\t').collect(),
            false => vec![&text],
        };
        let columns = columns.into_iter().map(|column| parts(column, fields));
        Ok(Self {
            columns: columns.collect::<Result<_, _>>()?,
            is_table,
        })
    }

    /// Formats the items, one per line.
    pub(super) fn render<T>(&self, fields: &[Field<T>], items: &[T], now_s: u64) -> String {
        let cell = |column: &[Part], shown: &dyn Fn(&Field<T>) -> String| -> String {
            let texts = column.iter().map(|part| match part {
                Part::Text(text) => text.clone(),
                Part::Field(at) => shown(&fields[*at]),
            });
            texts.collect()
        };
        let row = |item: &T| -> Vec<String> {
            let columns = self.columns.iter();
            let shown = |field: &Field<T>| (field.value)(item).show(now_s);
            columns.map(|column| cell(column, &shown)).collect()
        };
        if !self.is_table {
            return items.iter().map(|item| row(item).concat() + "\n").collect();
        }
        let header = |column: &Vec<Part>| cell(column, &|field| field.header.to_owned());
        let headers: Vec<String> = self.columns.iter().map(header).collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        output::table(&headers, &items.iter().map(row).collect::<Vec<_>>())
    }
}

/// Splits a template into literal texts and fields.
fn parts<T>(text: &str, fields: &[Field<T>]) -> Result<Vec<Part>, Error> {
    let (mut parts, mut rest) = (Vec::new(), text);
    while let Some((before, behind)) = rest.split_once("{{") {
        let not_closed = || Error::invalid("--format has {{ without }}").hint(names(fields));
        let (inside, behind) = behind.split_once("}}").ok_or_else(not_closed)?;
        let name = inside.trim();
        let at = name
            .strip_prefix('.')
            .and_then(|name| fields.iter().position(|field| field.name == name));
        let unknown = || {
            let text = format!("--format has an unknown field: {}", quoted(name));
            let hint = names(fields);
            Error::invalid(text).hint(if name.starts_with("json") {
                format!("for JSON: --format json\n{hint}")
            } else {
                hint
            })
        };
        parts.push(Part::Text(before.to_owned()));
        parts.push(Part::Field(at.ok_or_else(unknown)?));
        rest = behind;
    }
    parts.push(Part::Text(rest.to_owned()));
    parts.retain(|part| *part != Part::Text(String::new()));
    Ok(parts)
}

/// Sorts items by the field that `--sort` names, in descending order after `-`. Items with the same
/// value keep their order.
///
/// # Errors
/// `invalid_argument` for an unknown field. The hint lists the known ones.
pub(super) fn sort<T>(items: &mut [T], by: &str, fields: &[Field<T>]) -> Result<(), Error> {
    let (name, is_descending) = match by.strip_prefix('-') {
        Some(name) => (name, true),
        None => (by, false),
    };
    let name = name.trim_start_matches('.');
    let field = fields.iter().find(|f| f.name.eq_ignore_ascii_case(name));
    let unknown =
        || Error::invalid(format!("--sort {}: unknown field", quoted(by))).hint(names(fields));
    let value = field.ok_or_else(unknown)?.value;
    if is_descending {
        items.sort_by_cached_key(|item| std::cmp::Reverse(value(item)));
    } else {
        items.sort_by_cached_key(value);
    }
    Ok(())
}

/// The options `--format` and `--sort` of a list.
#[derive(clap::Args, Debug, Default)]
pub(super) struct ListArgs {
    /// Print with a template such as '{{.Name}}\t{{.State}}', or `json`. `table` before the
    /// template adds a header (fcctl help lists)
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "quiet")]
    pub format: Option<String>,
    /// Sort by a field of the templates, in descending order with - before it
    #[arg(long, value_name = "FIELD", allow_hyphen_values = true)]
    pub sort: Option<String>,
}

impl ListArgs {
    pub(super) fn is_empty(&self) -> bool {
        self.format.is_none() && self.sort.is_none()
    }

    /// Checks the options. Call this before the daemon is called, so that a mistake fails at once.
    pub(super) fn parse<T>(&self, fields: &[Field<T>]) -> Result<Option<Template>, Error> {
        if let Some(by) = &self.sort {
            sort(&mut [], by, fields)?;
        }
        // `--format table` without a template means the usual table.
        let format = self.format.as_deref().filter(|text| *text != "table");
        format.map(|text| Template::parse(text, fields)).transpose()
    }

    pub(super) fn sort<T>(&self, items: &mut [T], fields: &[Field<T>]) -> Result<(), Error> {
        self.sort
            .as_ref()
            .map_or(Ok(()), |by| sort(items, by, fields))
    }
}

/// The options of a list whose items have a name or an ID.
#[derive(clap::Args, Debug, Default)]
pub(super) struct QuietListArgs {
    /// Print only names or IDs, one per line
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    list: ListArgs,
}

/// How the items of a list are shown.
pub(super) struct Shape<T: 'static> {
    pub fields: &'static [Field<T>],
    /// Returns the one value of an item that `--quiet` prints.
    pub id: fn(&T) -> String,
    /// Renders the usual table. The number is the current time in seconds since the epoch.
    pub table: fn(&[T], u64) -> String,
}

impl QuietListArgs {
    /// Checks the options. Call this before the daemon is called, so that a mistake fails at once.
    pub(super) fn check<T>(&self, shape: &Shape<T>) -> Result<(), Error> {
        self.list.parse(shape.fields).map(drop)
    }

    /// Prints the items as the options ask.
    pub(super) fn print<T: Serialize>(
        &self,
        printer: &mut Printer,
        shape: &Shape<T>,
        mut items: Vec<T>,
        now_s: u64,
    ) -> crate::client::Result<()> {
        self.list.sort(&mut items, shape.fields)?;
        let template = self.list.parse(shape.fields)?;
        if self.quiet {
            let ids: Vec<String> = items.iter().map(shape.id).collect();
            return match printer.json {
                true => printer.document(&ids),
                false => printer.text(&ids.iter().map(|id| format!("{id}\n")).collect::<String>()),
            };
        }
        match template {
            _ if printer.json => printer.document(&items),
            Some(template) => printer.text(&template.render(shape.fields, &items, now_s)),
            None => printer.text(&(shape.table)(&items, now_s)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    struct Thing(&'static str, u64);

    const FIELDS: &[Field<Thing>] = &[
        field("Name", "NAME", |t| Value::text(t.0)),
        field("Size", "SIZE", |t| Value::Bytes(t.1)),
        field("At", "CREATED", |t| Value::Time(t.1)),
        field("None", "NONE", |_| Value::Missing),
    ];

    fn things() -> [Thing; 3] {
        [
            Thing("web", 9 << 20),
            Thing("a\u{1b}[2J", 10 << 20),
            Thing("z", 0),
        ]
    }

    #[track_caller]
    fn check(template: &str, expected: Expect) {
        let text = match Template::parse(template, FIELDS) {
            Ok(template) => template.render(FIELDS, &things(), 11 << 20),
            Err(e) => format!("{e}\nhint: {}\n", e.hint_text().unwrap()),
        };
        expected.assert_eq(&text);
    }

    #[test]
    fn templates_are_rendered() {
        check(
            "{{.Name}}",
            expect![[r#"
                web
                a\u{1b}[2J
                z
            "#]],
        );
        check(
            r"{{ .Name }}\t{{.Size}}: {{.None}}|",
            expect![[r#"
                web	9 MiB: |
                a\u{1b}[2J	10 MiB: |
                z	0 B: |
            "#]],
        );
        check(
            r"table {{.Name}}\t{{.Size}} ({{.At}})",
            expect![[r#"
                NAME        SIZE (CREATED)
                web         9 MiB (24d ago)
                a\u{1b}[2J  10 MiB (12d ago)
                z           0 B (133d ago)
            "#]],
        );
    }

    #[test]
    fn unknown_fields_are_refused_with_those_that_exist() {
        check(
            "{{.Nam}}",
            expect![[r#"
                --format has an unknown field: ".Nam"
                hint: fields: .Name .Size .At .None
            "#]],
        );
        check(
            "{{json .}}",
            expect![[r#"
                --format has an unknown field: "json ."
                hint: for JSON: --format json
                fields: .Name .Size .At .None
            "#]],
        );
        check(
            "{{.Name",
            expect![[r#"
                --format has {{ without }}
                hint: fields: .Name .Size .At .None
            "#]],
        );
        let e = sort(&mut things(), "sise", FIELDS).unwrap_err();
        assert_eq!(e.to_string(), r#"--sort "sise": unknown field"#);
    }

    #[test]
    fn items_are_sorted_by_meaning() {
        let sorted = |by: &str| {
            let mut all = things();
            sort(&mut all, by, FIELDS).unwrap();
            all.map(|t| t.0)
        };
        assert_eq!(sorted("size"), ["z", "web", "a\u{1b}[2J"]);
        assert_eq!(sorted("-Size"), ["a\u{1b}[2J", "web", "z"]);
        assert_eq!(sorted(".name"), ["a\u{1b}[2J", "web", "z"]);
        assert_eq!(sorted("-none"), ["web", "a\u{1b}[2J", "z"]);
    }

    #[test]
    fn fields_of_each_list_are_documented() {
        fn row<T>(list: &str, fields: &[Field<T>]) -> String {
            let names: Vec<_> = fields.iter().map(|f| format!("`{}`", f.name)).collect();
            format!("| {list} | {} |\n", names.join(" "))
        }
        let text = include_str!("../docs/lists.md");
        for row in [
            row("`ps`, `vm list`, `inspect`", super::super::ps::FIELDS),
            row("`images`, `image list`", super::super::image_list::FIELDS),
            row("`snapshot list`", super::super::snapshot::SHAPE.fields),
            row("`kernel list`", super::super::kernel::SHAPE.fields),
            row("`op list`", super::super::op::SHAPE.fields),
        ] {
            assert!(text.contains(&row), "{row}");
        }
    }
}
