//! What an operation cost both processes, as `nixl` prints it.

use super::report::NixlSeries;
use crate::report::{Cost, align};

/// A row for each series that has costs; empty without any.
pub(crate) fn cost_table(series: &[NixlSeries]) -> String {
    let header = ["case", "backend", "cpu us/op i", "t", "switches/op i", "t"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for row in series.iter().filter(|row| row.is_shown()) {
        let Some(costs) = row.costs else { continue };
        let cpu = |cost: Cost| format!("{:.2}", cost.cpu_s_per_million_operations);
        let switches = |cost: Cost| {
            let all =
                cost.voluntary_switches_per_operation + cost.involuntary_switches_per_operation;
            format!("{all:.3}")
        };
        rows.push(vec![
            row.id.clone(),
            row.backend.clone(),
            cpu(costs.initiator),
            cpu(costs.target),
            switches(costs.initiator),
            switches(costs.target),
        ]);
    }
    if rows.len() == 1 {
        return String::new();
    }
    format!(
        "\n{}\nCPU time and context switches of the initiator's process (i) and of the target's (t), all threads, polling included.\n",
        align(&rows, 2)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nixl::nixl_compared;

    #[test]
    fn costs_are_printed_for_each_backend() {
        let mut results = nixl_compared();
        results.series.iter_mut().for_each(|row| row.costs = None);
        assert_eq!(cost_table(&results.series), "", "nothing was counted");
        let cost = |us, switches| Cost {
            cpu_s_per_gib: None,
            cpu_s_per_million_operations: us,
            voluntary_switches_per_operation: switches,
            involuntary_switches_per_operation: 0.25,
        };
        let row = results.series.iter_mut().find(|row| row.backend.starts_with("UCX"));
        let row = row.expect("a row of UCX");
        row.costs =
            Some(crate::report::Costs { initiator: cost(6.5, 1.0), target: cost(7.0, 0.0) });
        let table = cost_table(&results.series);
        let line = table.lines().find(|line| line.contains("UCX")).expect("a row");
        let cells: Vec<&str> = line.split_whitespace().skip(2).collect();
        assert_eq!(cells, ["6.50", "7.00", "1.250", "0.250"], "{table}");
    }
}
