//! Tables and trees in the form that virsh gives them. Pure.

/// Rows in columns, the first row being the head.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |i: usize| {
        rows.iter()
            .map(|row| row.get(i).map_or(0, String::len))
            .max()
    };
    let widths: Vec<usize> = (0..columns).map(|i| width(i).unwrap_or(0)).collect();
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!(" {cell:width$}  ");
        }
        out += line.trim_end();
        out.push('\n');
        if i == 0 {
            out += &"-".repeat(widths.iter().map(|w| w + 3).sum());
            out.push('\n');
        }
    }
    out
}

/// A tree, as `virsh checkpoint-list --tree` draws it. `parents` has the place of each one's
/// parent; those without, and with it outside, are roots. No parent may come after its child.
pub(super) fn tree(labels: &[String], parents: &[Option<usize>]) -> String {
    let mut children = vec![Vec::new(); labels.len()];
    let mut roots = Vec::new();
    for (i, parent) in parents.iter().enumerate() {
        match parent.filter(|&p| p < i).and_then(|p| children.get_mut(p)) {
            Some(siblings) => siblings.push(i),
            None => roots.push(i),
        }
    }
    let mut out = String::new();
    for root in roots {
        // Not by recursion: a chain may have thousands.
        let mut todo = vec![(root, String::new(), String::new(), true)];
        while let Some((at, lead, indent, last)) = todo.pop() {
            out += &format!("{lead}{}\n", labels[at]);
            if children[at].is_empty() {
                if last {
                    out += indent.trim_end();
                    out.push('\n');
                }
                continue;
            }
            out += &format!("{indent}  |\n");
            let inner = format!("{indent}  ");
            for (i, &child) in children[at].iter().enumerate().rev() {
                let last = i + 1 == children[at].len();
                let below = format!("{inner}{}", if last { "  " } else { "| " });
                todo.push((child, format!("{inner}+- "), below, last));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        assert_eq!(
            table(&[
                row(["Name", "Size"]),
                row(["friday", ""]),
                row(["x", "1 B"])
            ]),
            " Name     Size\n----------------\n friday\n x        1 B\n"
        );
    }

    #[test]
    fn branches() {
        let labels = ["a", "b", "c", "d", "e", "f"].map(str::to_owned);
        let parents = [None, Some(0), Some(1), Some(0), Some(3), None];
        assert_eq!(
            tree(&labels, &parents),
            "a\n  |\n  +- b\n  |   |\n  |   +- c\n  |\n  +- d\n      |\n      +- e\n\nf\n\n"
        );
    }
}
