//! Changes to a TOML file that leave all else in it as it is, and their way back.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, TableLike};

use super::settings::{Setting, get, shown};

/// A key that was changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Change {
    pub(super) path: Vec<String>,
    /// What it said; `None` if it was not there.
    pub(super) before: Option<Value>,
    pub(super) after: Value,
    /// How many of the tables around it were there.
    tables: usize,
}

impl Change {
    /// The change as a line for people.
    pub(super) fn shown(&self) -> String {
        let was = match &self.before {
            Some(before) => format!(" (was {before})"),
            None => String::new(),
        };
        format!("{} = {}{was}", shown(&self.path), self.after)
    }
}

/// The text with these settings, and what was changed for them.
pub(super) fn apply(text: &str, settings: &[Setting]) -> Result<(String, Vec<Change>)> {
    let before: Table = toml::from_str(text)?;
    let mut document: DocumentMut = text.parse()?;
    let mut changes = Vec::new();
    for Setting { path, value } in settings {
        let keys: Vec<&str> = path.iter().map(String::as_str).collect();
        let old = get(&before, &keys);
        if old == Some(value) {
            continue;
        }
        let is_table = |n: &usize| get(&before, &keys[..*n]).is_some();
        let tables = (1..keys.len()).take_while(is_table).count();
        set(&mut document, path, value)?;
        let (path, after) = (path.clone(), value.clone());
        changes.push(Change { path, before: old.cloned(), after, tables });
    }
    Ok((document.to_string(), changes))
}

/// The text without the changes, and the keys that say something else by now and are left as they are.
pub(super) fn undo(text: &str, changes: &[Change]) -> Result<(String, Vec<String>)> {
    let now: Table = toml::from_str(text)?;
    let mut document: DocumentMut = text.parse()?;
    let mut left = Vec::new();
    for change in changes.iter().rev() {
        let keys: Vec<&str> = change.path.iter().map(String::as_str).collect();
        let Some(current) = get(&now, &keys) else { continue };
        let value = match (current, &change.before, &change.after) {
            (current, before, after) if current == after => before.clone(),
            // Others may have added to the list.
            (Value::Array(current), before, Value::Array(after)) => {
                let old = before.as_ref().and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
                let ours = |entry: &Value| after.contains(entry) && !old.contains(entry);
                Some(Value::Array(current.iter().filter(|entry| !ours(entry)).cloned().collect()))
            }
            _ => {
                left.push(format!("{} = {current}", shown(&change.path)));
                continue;
            }
        };
        match value {
            Some(value) => set(&mut document, &change.path, &value)?,
            None => remove(document.as_table_mut(), &change.path, change.tables),
        }
    }
    Ok((document.to_string(), left))
}

fn set(document: &mut DocumentMut, path: &[String], value: &Value) -> Result<()> {
    let (last, tables) = path.split_last().context("a setting has a key")?;
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for (depth, key) in tables.iter().enumerate() {
        let is_last = depth + 1 == tables.len();
        let item = table.entry(key).or_insert_with(|| {
            let mut new = toml_edit::Table::new();
            // One that has nothing but other tables needs no line of its own.
            new.set_implicit(!is_last || value.is_array());
            Item::Table(new)
        });
        table = match item.as_table_like_mut() {
            Some(table) => table,
            None => bail!("{} is not a table", shown(&path[..=depth])),
        };
    }
    let entry = table.entry(last).or_insert(Item::None);
    if let Value::Array(list) = value
        && list.iter().all(Value::is_table)
        && set_tables(entry, list)
    {
        return Ok(());
    }
    let mut new = edited(value);
    if let Some(old) = entry.as_value() {
        // A comment at the end of the line is kept.
        *new.decor_mut() = old.decor().clone();
    }
    *entry = Item::Value(new);
    Ok(())
}

/// Makes an array of tables of a list; those that are there already are not touched. False if it is written
/// in one line.
fn set_tables(entry: &mut Item, list: &[Value]) -> bool {
    if entry.is_none() {
        *entry = Item::ArrayOfTables(ArrayOfTables::new());
    }
    let Some(tables) = entry.as_array_of_tables_mut() else { return false };
    let is_kept = |table: &toml_edit::Table| {
        let table: Option<Table> = toml::from_str(&bare(table)).ok();
        table.is_some_and(|table| list.contains(&Value::Table(table)))
    };
    tables.retain(is_kept);
    let n_kept = tables.len();
    for value in list.iter().skip(n_kept) {
        if let Value::Table(table) = value {
            let mut new = toml_edit::Table::new();
            for (key, value) in table {
                new.insert(key, Item::Value(edited(value)));
            }
            tables.push(new);
        }
    }
    true
}

/// A table by itself.
fn bare(table: &toml_edit::Table) -> String {
    DocumentMut::from(table.clone()).to_string()
}

fn edited(value: &Value) -> toml_edit::Value {
    match value {
        Value::String(text) => text.as_str().into(),
        Value::Integer(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Boolean(flag) => (*flag).into(),
        Value::Datetime(time) => time.to_string().into(),
        Value::Array(list) => list.iter().map(edited).collect::<Array>().into(),
        Value::Table(table) => {
            let pairs = table.iter().map(|(key, value)| (key.as_str(), edited(value)));
            pairs.collect::<InlineTable>().into()
        }
    }
}

/// Removes a key, and the tables around it that are empty then, from the one at depth `from` on.
fn remove(table: &mut dyn TableLike, path: &[String], from: usize) {
    let Some((key, rest)) = path.split_first() else { return };
    if rest.is_empty() {
        table.remove(key);
        return;
    }
    let Some(inner) = table.get_mut(key).and_then(Item::as_table_like_mut) else { return };
    remove(inner, rest, from.saturating_sub(1));
    if from == 0 && inner.is_empty() {
        table.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(path: &[&str], value: impl Into<Value>) -> Setting {
        Setting { path: path.iter().map(|key| (*key).to_owned()).collect(), value: value.into() }
    }

    fn list(names: &[&str]) -> Value {
        let entry =
            |name: &&str| Value::Table([("s".to_owned(), (*name).into())].into_iter().collect());
        Value::Array(names.iter().map(entry).collect())
    }

    #[track_caller]
    fn check(text: &str, settings: &[Setting], expected: &str) {
        let (changed, changes) = apply(text, settings).unwrap();
        assert_eq!(changed, expected);
        let again = apply(&changed, settings).unwrap();
        assert_eq!(again, (changed.clone(), Vec::new()), "once is enough");
        let (undone, left) = undo(&changed, &changes).unwrap();
        assert_eq!((undone.trim_end(), left.len()), (text.trim_end(), 0));
    }

    #[test]
    fn comments_stay_and_changes_can_be_undone() {
        let ours = [setting(&["a", "b.c", "d"], "x"), setting(&["a", "b.c", "e"], false)];
        check("", &ours, "[a.\"b.c\"]\nd = \"x\"\ne = false\n");
        check(
            "# One\nv = 1 # two\n\n[a.\"b.c\"] # three\nd = \"y\" # four\n# five\n[f]\n",
            &ours,
            "# One\nv = 1 # two\n\n[a.\"b.c\"] # three\nd = \"x\" # four\ne = false\n# five\n[f]\n",
        );
        check("[a]\nz = 1\n", &ours, "[a]\nz = 1\n\n[a.\"b.c\"]\nd = \"x\"\ne = false\n");
        check(
            "a = { \"b.c\" = { d = 1 } }\n",
            &ours,
            "a = { \"b.c\" = { d = \"x\" , e = false } }\n",
        );
    }

    #[test]
    fn lists_grow_at_their_end() {
        let ours = [setting(&["t", "u"], list(&["o", "h"]))];
        check("", &ours, "[[t.u]]\ns = \"o\"\n\n[[t.u]]\ns = \"h\"\n");
        check(
            "[[t.u]] # one\ns = \"o\" # two\n",
            &ours,
            "[[t.u]] # one\ns = \"o\" # two\n\n[[t.u]]\ns = \"h\"\n",
        );
        check("[t]\nu = [{ s = \"o\" }]\n", &ours, "[t]\nu = [{ s = \"o\" }, { s = \"h\" }]\n");
    }

    #[test]
    fn what_others_changed_meanwhile_is_left() {
        let ours = [setting(&["a", "b"], 1), setting(&["c"], list(&["o", "h"]))];
        let (_, changes) = apply("", &ours).unwrap();
        let now = "[a]\nb = 2\nd = 3\n[[c]]\ns = 'o'\n[[c]]\ns = 'h'\n[[c]]\ns = 'i'\n";
        let (undone, left) = undo(now, &changes).unwrap();
        assert_eq!(undone, "[a]\nb = 2\nd = 3\n[[c]]\ns = 'i'\n");
        assert_eq!(left, ["a.b = 2"]);
        let (undone, _) = undo("[a]\nb = 1\nd = 3\n", &changes).unwrap();
        assert_eq!(undone, "[a]\nd = 3\n");
        let (undone, _) = undo("e = 1\n", &changes).unwrap();
        assert_eq!(undone, "e = 1\n");
    }

    #[test]
    fn what_is_no_table_is_said() {
        let err = apply("a = 1\n", &[setting(&["a", "b"], 1)]).unwrap_err();
        assert_eq!(err.to_string(), "a is not a table");
        apply("a = [", &[]).unwrap_err();
    }
}
