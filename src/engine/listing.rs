//! Which checkpoints there are, and how they hang together. Nothing here asks the domain.

use std::collections::HashSet;
use std::sync::Arc;

use super::checkpoints::no_checkpoint;
use super::domain::{CheckpointEntry, Domain};
use crate::model::{Name, Result};

/// Which checkpoints to list: libvirt's flags. None set: all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListFilter {
    /// Without a parent only.
    pub roots: bool,
    /// Without children only.
    pub leaves: bool,
    /// With children only.
    pub no_leaves: bool,
    /// The children of this one only.
    pub from: Option<Name>,
    /// With `from`: all its descendants.
    pub descendants: bool,
}

impl Domain {
    /// The checkpoints that the filter lets through, in topological order: each after its parent.
    pub fn list_checkpoints(&self, filter: &ListFilter) -> Result<Vec<Arc<CheckpointEntry>>> {
        let all = self.checkpoints();
        let parents: HashSet<&Name> = all
            .iter()
            .filter_map(|e| e.checkpoint.parent.as_ref())
            .collect();
        let among = match &filter.from {
            None => all.clone(),
            Some(name) if self.checkpoint(name.as_str()).is_none() => {
                return Err(no_checkpoint(name));
            }
            Some(name) if filter.descendants => self.descendants(name),
            Some(name) => self.children(name),
        };
        let wanted = |e: &Arc<CheckpointEntry>| {
            let leaf = !parents.contains(&e.checkpoint.name);
            !(filter.roots && e.checkpoint.parent.is_some()
                || filter.leaves && !leaf
                || filter.no_leaves && leaf)
        };
        Ok(among.into_iter().filter(wanted).collect())
    }

    /// The checkpoints whose parent this is.
    pub fn children(&self, name: &Name) -> Vec<Arc<CheckpointEntry>> {
        let mut all = self.checkpoints();
        all.retain(|e| e.checkpoint.parent.as_ref() == Some(name));
        all
    }

    /// The children, their children and so on; each after its parent.
    pub fn descendants(&self, name: &Name) -> Vec<Arc<CheckpointEntry>> {
        let mut family = HashSet::from([name.clone()]);
        let mut all = self.checkpoints();
        // A child is younger than its parent, and so comes later.
        all.retain(|e| {
            let parent = e.checkpoint.parent.as_ref();
            parent.is_some_and(|p| family.contains(p)) && family.insert(e.checkpoint.name.clone())
        });
        all
    }

    /// The checkpoint before this one, if there is one.
    pub fn parent(&self, name: &Name) -> Result<Option<Arc<CheckpointEntry>>> {
        let entry = self.checkpoint(name.as_str());
        let entry = entry.ok_or_else(|| no_checkpoint(name))?;
        let parent = entry.checkpoint.parent.as_ref();
        Ok(parent.and_then(|p| self.checkpoint(p.as_str())))
    }

    /// The newest checkpoint: the one that records.
    pub fn current_checkpoint(&self) -> Option<Arc<CheckpointEntry>> {
        self.state.read().checkpoints.last().cloned()
    }
}
