//! The exports that clients may have, by the names that they know them under.

/// One export.
#[derive(Debug)]
pub(super) struct Export {
    /// What clients call it.
    pub(super) public: String,
    /// What the private server calls it; never shown.
    pub(super) private: String,
}

#[derive(Debug)]
pub(super) struct Names(Vec<Export>);

impl Names {
    pub(super) fn new(exports: Vec<(String, String)>) -> Self {
        let export = |(public, private)| Export { public, private };
        Self(exports.into_iter().map(export).collect())
    }

    pub(super) fn public(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|export| &*export.public)
    }

    /// What a client means by `name`. The empty name is the default export ("Export names"), and
    /// there is one only if nobody has to choose.
    pub(super) fn find(&self, name: &[u8]) -> Option<&Export> {
        let mut all = self.0.iter();
        let named = all.find(|export| export.public.as_bytes() == name);
        named.or(match &*self.0 {
            [only] if name.is_empty() => Some(only),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_names_are_found() {
        let pair = |public: &str, private: &str| (public.to_owned(), private.to_owned());
        let found = |names: &Names, name: &str| {
            let export = names.find(name.as_bytes());
            export.map(|e| e.private.clone())
        };
        let one = Names::new(vec![pair("vda", "x1")]);
        assert_eq!(found(&one, "vda").as_deref(), Some("x1"));
        assert_eq!(found(&one, "").as_deref(), Some("x1"));
        assert_eq!(found(&one, "x1"), None);
        assert_eq!(found(&one, "vd"), None);
        let two = Names::new(vec![pair("vda", "x1"), pair("vdb", "x2")]);
        assert_eq!(found(&two, "vdb").as_deref(), Some("x2"));
        assert_eq!(found(&two, ""), None);
        assert_eq!(found(&Names::new(Vec::new()), ""), None);
    }
}
