// One rank that sums with real oneCCL, started by the supervisor like a rank of the trainer.
// Usage: allreduce FILE. Rank 0 writes the address of its key-value store to FILE; torch's store carries it in a job.
// Prints "sum N STATUS affinity LIST", where LIST are the CPUs of the process.
#include <sched.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "oneapi/ccl.hpp"

namespace {

int number(const char *name) {
    const char *text = std::getenv(name);
    if (text == nullptr) {
        std::fprintf(stderr, "%s is not set\n", name);
        std::exit(2);
    }
    return std::atoi(text);
}

ccl::kvs::address_type wait_for_address(const std::string &path) {
    ccl::kvs::address_type address;
    for (int waited = 0; waited < 120 * 50; ++waited) {
        std::ifstream file(path, std::ios::binary);
        if (file && file.read(reinterpret_cast<char *>(address.data()), address.size())) return address;
        usleep(20 * 1000);
    }
    std::fprintf(stderr, "rank 0 wrote no address\n");
    std::exit(3);
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    const std::string path = argv[1];
    const int rank = number("RANK"), size = number("WORLD_SIZE");
    ccl::init();
    ccl::shared_ptr_class<ccl::kvs> store;
    if (rank == 0) {
        store = ccl::create_main_kvs();
        const auto address = store->get_address();
        std::ofstream file(path + ".partial", std::ios::binary);
        file.write(reinterpret_cast<const char *>(address.data()), address.size());
        file.close();
        std::rename((path + ".partial").c_str(), path.c_str());
    } else {
        store = ccl::create_kvs(wait_for_address(path));
    }
    auto communicator = ccl::create_communicator(size, rank, store);
    bool right = true;
    for (const size_t count : {size_t(1), size_t(1000), size_t(1) << 20}) {
        std::vector<float> values(count), sums(count);
        for (size_t index = 0; index < count; ++index) values[index] = float(rank + 1) + float(index % 7);
        ccl::allreduce(values.data(), sums.data(), count, ccl::reduction::sum, communicator).wait();
        const float ranks = float(size * (size + 1) / 2);
        for (size_t index = 0; index < count; ++index) {
            right = right && sums[index] == ranks + float(size) * float(index % 7);
        }
    }
    cpu_set_t set;
    sched_getaffinity(0, sizeof(set), &set);
    std::string cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &set)) cpus += (cpus.empty() ? "" : ",") + std::to_string(cpu);
    }
    std::printf("sum %d %s affinity %s\n", size, right ? "right" : "wrong", cpus.c_str());
    return right ? 0 : 1;
}
