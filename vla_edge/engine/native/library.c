/* Operators of our own for ONNX Runtime, which runs them on its threads: each in a file of its own. */
#include "operator.h"

static const CustomOp *const OPERATORS[] = {
    &int4_operator, &int8_operator, &attention_operator, &cached_operator, &rotary_operator,
};

/* What the runtime calls when it is told of this library. */
EXPORTED Status RegisterCustomOps(void *options, const OrtApiBase *base) {
    static void *domain; /* for as long as the process lives: sessions keep a pointer to it */
    OrtApi *api = base->get_api(ORT_VERSION);
    if (!api) return ((OrtApi *)base->get_api(1)) ? fail(base->get_api(1), "vla_edge: ONNX Runtime is too old") : NULL;
    if (!domain) {
        void *made;
        TRY(CALL(api, CreateCustomOpDomain, CREATE_CUSTOM_OP_DOMAIN)("vla_edge", &made));
        for (size_t i = 0; i < sizeof OPERATORS / sizeof *OPERATORS; i++)
            TRY(CALL(api, CustomOpDomainAdd, CUSTOM_OP_DOMAIN_ADD)(made, OPERATORS[i]));
        domain = made;
    }
    return CALL(api, AddCustomOpDomain, ADD_CUSTOM_OP_DOMAIN)(options, domain);
}

/* Whether they run on this processor, in the way of that name or any. */
EXPORTED int vla_edge_runs(const char *way) { return find_way(way) != NULL; }
